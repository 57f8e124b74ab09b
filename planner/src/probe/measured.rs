//! Summaries of repeated measurements.

/// A figure from several repetitions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Median.
    pub value: f64,
    /// (largest − smallest) / median.
    pub spread: f64,
}

impl Measured {
    /// Summarizes repetitions; of an empty list, both figures are 0.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (Some(first), Some(last)) = (values.first(), values.last()) else {
            return Measured {
                value: 0.0,
                spread: 0.0,
            };
        };
        let middle = values.len() / 2;
        let value = if values.len() % 2 == 1 {
            values[middle]
        } else {
            (values[middle - 1] + values[middle]) / 2.0
        };
        Measured {
            value,
            spread: if value > 0.0 {
                (last - first) / value
            } else {
                0.0
            },
        }
    }

    /// Summarizes many short repetitions in order of time: the median of all, and the spread of the
    /// means of fifths. Single short repetitions say more about the moment than about the machine.
    pub fn of_many(values: &[f64]) -> Self {
        let fifths: Vec<f64> = values
            .chunks(values.len().div_ceil(5).max(1))
            .map(|part| part.iter().sum::<f64>() / part.len() as f64)
            .collect();
        Measured {
            value: Measured::of(values.to_vec()).value,
            spread: Measured::of(fifths).spread,
        }
    }
}
