//! Tables of n-grams as data: rows that a token and those just before it name.

use super::{Linear, TensorId, Tensors};

/// A table with rows for n-grams of 2 to `n` tokens. A token has `heads_per_order` rows for each
/// length. They depend on the tokens alone, so an engine knows them before it computes anything.
///
/// With `c_0` the token, `c_s` the one `s` places before it, and the end token in place of `c_s`
/// and all older ones once a `c_s` (`s >= 1`) is the end token or lies before the text: the heads of
/// `o` tokens read row `first + (c_0 m_0 ⊕ … ⊕ c_(o-1) m_(o-1)) mod rows`, in wrapping 64-bit
/// integers.
#[derive(Debug, Clone)]
pub struct NgramTable {
    /// `[rows, width]`.
    pub table: TensorId,
    /// Rows of the table.
    pub n_rows: usize,
    /// Values per row; all heads' rows together are as wide as the hidden state.
    pub width: usize,
    /// Tokens of the longest n-gram, at least 2.
    pub n: usize,
    /// Heads per length of n-gram.
    pub heads_per_order: usize,
    /// The factors `m`, `[n]`.
    pub multipliers: Vec<u64>,
    /// Which rows each head reads, `[(n - 1) * heads_per_order]`.
    pub heads: Vec<NgramHead>,
    /// The token that ends texts.
    pub end_token: u32,
}

/// Rows of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NgramHead {
    /// The first one.
    pub first: u64,
    /// How many there are, at least 1.
    pub n: u64,
}

/// What a layer adds to each stream `R[j]` before its mixer, from a token's rows `e` of the table.
///
/// With norms per stream: `s_j = rms(key e)_j · rms(R)_j / sqrt(hidden)`,
/// `gate_j = σ(sign(s_j) · sqrt(max(|s_j|, 1e-6)))`, `v_j = gate_j · value e`, and `y` the causal
/// convolution of each channel of `rms(v)`, whose taps are `dilation` tokens apart:
/// `R'[j] = R[j] + v_j + silu(y_j)`.
#[derive(Debug, Clone, Copy)]
pub struct NgramBlock {
    /// `[streams * hidden, hidden]`.
    pub key: Linear,
    /// `[hidden, hidden]`.
    pub value: Linear,
    /// `[streams, hidden]`.
    pub key_norm: TensorId,
    /// `[streams, hidden]`.
    pub query_norm: TensorId,
    /// `[streams, hidden]`.
    pub conv_norm: TensorId,
    /// `[streams * hidden, taps]`, oldest tap first.
    pub conv: TensorId,
    /// Taps of the convolution, the current token's included.
    pub taps: usize,
    /// Tokens from one tap to the next.
    pub dilation: usize,
}

impl NgramBlock {
    /// Returns the tensors that it reads in its layer.
    pub fn tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        tensors.linears([&self.key, &self.value]);
        let vectors = [self.key_norm, self.query_norm, self.conv_norm, self.conv];
        tensors.vectors.extend(vectors);
        tensors
    }

    /// Returns the channels that are convolved: all values of all streams.
    pub fn channels(&self) -> usize {
        self.key.n_out
    }

    /// Returns the tokens whose inputs of the convolution are remembered.
    pub fn past(&self) -> usize {
        (self.taps - 1) * self.dilation
    }
}

impl NgramTable {
    /// Returns the rows that a token reads.
    pub fn n_heads(&self) -> usize {
        self.heads.len()
    }

    /// Writes the rows that a token reads, `[heads]`. `context` are the tokens up to it in the order
    /// of the text: the last one is the token, and none older than `n - 1` places before it matters.
    pub fn rows(&self, context: &[u32], rows: &mut [u64]) {
        let mut older = context.iter().rev().copied();
        let Some(token) = older.next() else { return };
        let mut mixed = u64::from(token).wrapping_mul(self.multipliers[0]);
        let mut ended = false;
        let orders = rows
            .chunks_exact_mut(self.heads_per_order)
            .zip(self.heads.chunks_exact(self.heads_per_order));
        for (multiplier, (rows, heads)) in self.multipliers[1..].iter().zip(orders) {
            let before = older.next();
            ended |= before.is_none_or(|token| token == self.end_token);
            let before = if ended { None } else { before };
            let before = u64::from(before.unwrap_or(self.end_token));
            mixed ^= before.wrapping_mul(*multiplier);
            for (row, head) in rows.iter_mut().zip(heads) {
                *row = head.first + mixed % head.n;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> NgramTable {
        let heads = [(0, 7), (7, 5), (12, 11), (23, 3)];
        NgramTable {
            table: 0,
            n_rows: 26,
            width: 1,
            n: 3,
            heads_per_order: 2,
            multipliers: vec![48_685_291_910_353_113, 44_883_688_893_204_351, u64::MAX],
            heads: heads.map(|(first, n)| NgramHead { first, n }).to_vec(),
            end_token: 9,
        }
    }

    /// Returns the rows by the formula, in integers of 128 bits.
    fn expected(table: &NgramTable, context: [u32; 3]) -> Vec<u64> {
        let product = |i: usize| {
            let exact = u128::from(context[i]) * u128::from(table.multipliers[i]);
            (exact % (1 << 64)) as u64
        };
        let pair = product(0) ^ product(1);
        let triple = pair ^ product(2);
        let heads = table.heads.iter().zip([pair, pair, triple, triple]);
        heads.map(|(head, x)| head.first + x % head.n).collect()
    }

    #[test]
    fn rows_are_those_of_the_tokens_and_of_an_end_where_the_text_ends() {
        let table = table();
        let of = |context: &[u32]| {
            let mut rows = vec![0; 4];
            table.rows(context, &mut rows);
            rows
        };
        assert_eq!(of(&[1, 2, 3]), expected(&table, [3, 2, 1]));
        assert_eq!(of(&[8, 1, 2, 3]), expected(&table, [3, 2, 1]));
        // A missing token is an end, and so is all before an end; the token's own end cuts nothing.
        assert_eq!(of(&[3]), expected(&table, [3, 9, 9]));
        assert_eq!(of(&[2, 3]), expected(&table, [3, 2, 9]));
        assert_eq!(of(&[5, 9, 3]), expected(&table, [3, 9, 9]));
        assert_eq!(of(&[9, 2, 3]), expected(&table, [3, 2, 9]));
        assert_eq!(of(&[1, 2, 9]), expected(&table, [9, 2, 1]));
        assert_ne!(of(&[1, 2, 3]), of(&[4, 2, 3]));
    }
}
