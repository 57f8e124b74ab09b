//! Sequential reading with several items in flight, delivered in order.

use super::super::arena::Arena;
use super::{FileTier, Priority, ReadError, Span};
use std::collections::HashMap;

/// Reads each item's spans into a buffer of `buffer_bytes`, up to `depth` items at once, and passes
/// the item's index and its buffer to `each`, in the order of the items.
///
/// May be called only while nothing else of the tier is in flight. After an error reads may still
/// be in flight, so the tier must be dropped.
///
/// # Errors
/// When a read fails, the buffers can't be allocated, or `each` fails.
pub fn stream<E: From<ReadError>>(
    files: &FileTier,
    items: impl ExactSizeIterator<Item = Vec<Span>>,
    buffer_bytes: usize,
    depth: usize,
    mut each: impl FnMut(usize, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let depth = depth.min(items.len());
    let bytes = buffer_bytes.saturating_mul(depth);
    let mut free = Arena::new("", bytes as u64)
        .and_then(|mut arena| {
            (0..depth)
                .map(|_| arena.take(buffer_bytes))
                .collect::<Result<Vec<_>, _>>()
        })
        .map_err(|_| ReadError::Memory { bytes })?;
    let mut items = items.enumerate();
    let (mut in_flight, mut next) = (0, 0);
    let mut done = HashMap::new();
    loop {
        while let Some(buffer) = free.pop() {
            let Some((at, spans)) = items.next() else {
                free.push(buffer);
                break;
            };
            files.submit(at as u64, &spans, buffer, Priority::Demand);
            in_flight += 1;
        }
        if in_flight == 0 {
            return Ok(());
        }
        let completion = files.wait()?;
        completion.result?;
        done.insert(completion.key, completion.buffer);
        while let Some(buffer) = done.remove(&next) {
            each(next as usize, &buffer)?;
            next += 1;
            in_flight -= 1;
            free.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Extent, ReadMode};
    use super::*;

    #[test]
    fn items_come_in_order_whatever_the_depth() {
        let bytes: Vec<u8> = (0..50_000u32).map(|i| (i * 7 % 251) as u8).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        for depth in [1, 3, 100] {
            let files = FileTier::open(&[file.path().to_path_buf()], ReadMode::Cached).unwrap();
            let spans = (0..40u64).map(|i| {
                let extent = Extent {
                    part: 0,
                    offset: 1000 * i,
                    len: 1000,
                };
                vec![Span {
                    extent,
                    at: 0,
                    whole_pages: false,
                }]
            });
            let mut seen = Vec::new();
            let items: Vec<_> = spans.collect();
            stream(&files, items.into_iter(), 1000, depth, |at, got| {
                assert_eq!(at, seen.len() / 1000);
                seen.extend_from_slice(got);
                Ok::<_, ReadError>(())
            })
            .unwrap();
            assert!(seen[..] == bytes[..40_000]);
        }
    }

    #[test]
    fn the_first_error_ends_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [1; 100]).unwrap();
        let files = FileTier::open(&[file.path().to_path_buf()], ReadMode::Cached).unwrap();
        let item = |len| {
            vec![Span {
                extent: Extent {
                    part: 0,
                    offset: 0,
                    len,
                },
                at: 0,
                whole_pages: false,
            }]
        };
        let mut seen = 0;
        let items = vec![item(10), item(20), item(30)];
        let result = stream(&files, items.into_iter(), 30, 2, |at, _| {
            seen += 1;
            if at == 1 {
                Err(ReadError::Stopped)
            } else {
                Ok(())
            }
        });
        assert!(matches!(result, Err(ReadError::Stopped)));
        assert_eq!(seen, 2);
        let empty: Vec<Vec<Span>> = Vec::new();
        stream(&files, empty.into_iter(), 30, 2, |_, _| {
            Err(ReadError::Stopped)
        })
        .unwrap();
    }
}
