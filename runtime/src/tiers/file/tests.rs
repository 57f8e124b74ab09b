use super::super::arena::Arena;
use super::super::source::Stamp;
use super::*;
use proptest::prelude::*;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Condvar;
use std::sync::atomic::{AtomicU8, AtomicU64};

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Bytes none of which says where it is by itself, but any few together.
fn content(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

fn span(offset: u64, len: usize, at: usize) -> Span {
    Span {
        extent: Extent {
            part: 0,
            offset,
            len,
        },
        at,
        whole_pages: false,
    }
}

const MODES: [ReadMode; 3] = [ReadMode::Cached, ReadMode::Direct, ReadMode::Buffered];

#[test]
fn many_reads_come_back_with_their_own_bytes() {
    let content = content(3 * MAX_READ_BYTES + 777);
    let file = file(&content);
    for mode in MODES {
        let tier = FileTier::open(&[file.path().to_path_buf()], mode).unwrap();
        let mut arena = Arena::new("dram", 50 * 10).unwrap();
        for key in 0..50u64 {
            let spans = [span(key * 4095, 5, 5), span(200, 5, 0)];
            let priority = if key % 3 == 0 {
                Priority::Idle
            } else {
                Priority::Demand
            };
            tier.submit(key, &spans, arena.take(10).unwrap(), priority);
        }
        let mut seen = [false; 50];
        for _ in 0..50 {
            let completion = tier.wait().unwrap();
            completion.result.unwrap();
            let at = completion.key as usize * 4095;
            assert_eq!(completion.buffer[5..], content[at..at + 5]);
            assert_eq!(completion.buffer[..5], content[200..205]);
            seen[completion.key as usize] = true;
        }
        assert!(seen.iter().all(|s| *s));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever lies where: exactly the wanted bytes come, and nothing outside the spans' rooms
    /// changes.
    #[test]
    fn any_spans_come_exactly(
        offsets in proptest::collection::vec((0usize..3 * MAX_READ_BYTES, 0usize..MAX_READ_BYTES + 9000), 1..4),
        whole_pages in any::<bool>(),
        shift in 0usize..2,
        mode in 0usize..3,
    ) {
        let content = content(3 * MAX_READ_BYTES + 777);
        let file = file(&content);
        let tier = FileTier::open(&[file.path().to_path_buf()], MODES[mode]).unwrap();
        let (mut spans, mut end) = (Vec::new(), shift);
        for (offset, len) in offsets {
            let extent = Extent { part: 0, offset: offset as u64, len: len.min(content.len() - offset) };
            let at = if whole_pages { end + extent.head() } else { end + 3 };
            end = if whole_pages { end + extent.pages_bytes() } else { at + extent.len };
            spans.push(Span { extent, at, whole_pages });
        }
        let mut piece = Arena::new("dram", end as u64 + 5).unwrap().take(end + 5).unwrap();
        piece.fill(0xa5);
        let mut expected = piece.to_vec();
        for span in &spans {
            let Extent { offset, len, .. } = span.extent;
            expected[span.at..span.at + len].copy_from_slice(&content[offset as usize..][..len]);
        }
        let mut read = tier.read(&spans, piece).unwrap();
        for span in spans.iter().filter(|s| s.whole_pages) {
            let room = span.writable().unwrap();
            for i in room.filter(|i| !(span.at..span.at + span.extent.len).contains(i)) {
                read[i] = 0xa5;
            }
        }
        prop_assert_eq!(&read[..], &expected[..]);
    }
}

#[test]
fn spans_that_overlap_or_do_not_fit_are_refused() {
    let file = file(&content(9000));
    let tier = FileTier::open(&[file.path().to_path_buf()], ReadMode::Cached).unwrap();
    let whole = Span {
        whole_pages: true,
        ..span(4100, 5, 4)
    };
    for spans in [
        vec![span(0, 6, 0), span(9, 6, 5)],
        vec![span(0, 9000, 0)],
        vec![whole],
    ] {
        let piece = Arena::new("dram", 4096).unwrap().take(100).unwrap();
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            tier.submit(0, &spans, piece, Priority::Demand)
        }));
        assert!(caught.is_err(), "{spans:?}");
    }
}

#[test]
fn a_file_that_was_cut_or_written_to_is_named() {
    for mode in MODES {
        let file = file(&content(10_000));
        let tier = FileTier::open(&[file.path().to_path_buf()], mode).unwrap();
        tier.check().unwrap();
        file.as_file().set_len(5000).unwrap();
        let piece = Arena::new("dram", 8).unwrap().take(8).unwrap();
        let message = tier
            .read(&[span(6000, 8, 0)], piece)
            .err()
            .unwrap()
            .to_string();
        assert!(
            message.contains(&file.path().display().to_string()),
            "{message}"
        );
        assert!(message.contains("from 10000 to 5000 bytes"), "{message}");
        assert!(tier.check().is_err());
        file.as_file().set_len(10_000).unwrap();
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        file.as_file().set_modified(later).unwrap();
        assert!(tier.check().unwrap_err().to_string().contains("written to"));
    }
}

/// What a faulty source does at its n-th read.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Short,
    Nothing,
    Raw(i32),
}

/// Bytes that come with faults.
struct Faulty {
    bytes: Vec<u8>,
    faults: Vec<Fault>,
    reads: Arc<AtomicU64>,
    alignment: usize,
    grown: Arc<AtomicU8>,
}

impl ReadAt for Faulty {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let offset = offset as usize;
        assert!(offset.is_multiple_of(self.alignment) && into.len().is_multiple_of(self.alignment));
        assert!((into.as_ptr() as usize).is_multiple_of(self.alignment));
        let n = into.len().min(self.bytes.len().saturating_sub(offset));
        into[..n].copy_from_slice(&self.bytes[offset..offset + n]);
        match self
            .faults
            .get(self.reads.fetch_add(1, Ordering::SeqCst) as usize)
        {
            None => Ok(n),
            Some(Fault::Short) => {
                into[n / 2..].fill(0xee);
                Ok(n / 2)
            }
            Some(Fault::Nothing) => Ok(0),
            Some(Fault::Raw(code)) => Err(io::Error::from_raw_os_error(*code)),
        }
    }

    fn stamp(&self) -> io::Result<Stamp> {
        let grown = u64::from(self.grown.load(Ordering::SeqCst));
        Ok(Stamp {
            len: self.bytes.len() as u64 + grown,
            modified: None,
        })
    }

    fn alignment(&self) -> usize {
        self.alignment
    }
}

struct Trial {
    tier: FileTier,
    reads: Arc<AtomicU64>,
    grown: Arc<AtomicU8>,
    bytes: Vec<u8>,
}

fn trial(faults: &[Fault], alignment: usize) -> Trial {
    let (reads, grown) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU8::new(0)));
    let bytes = content(50_000);
    let (faults, source) = (faults.to_vec(), bytes.clone());
    let source = Faulty {
        bytes: source,
        faults,
        reads: Arc::clone(&reads),
        alignment,
        grown: Arc::clone(&grown),
    };
    let tier = FileTier::from_readers(vec![named(source)]).unwrap();
    Trial {
        tier,
        reads,
        grown,
        bytes,
    }
}

fn named(reader: impl ReadAt + 'static) -> NamedReader {
    NamedReader {
        path: "weights.gguf".into(),
        reader: Box::new(reader),
    }
}

fn piece(len: usize) -> ArenaSlice {
    Arena::new("dram", len as u64).unwrap().take(len).unwrap()
}

const EIO: Fault = Fault::Raw(5);
const EINTR: Fault = Fault::Raw(4);
const EACCES: Fault = Fault::Raw(13);

#[test]
#[cfg(unix)]
fn passing_faults_are_outlived() {
    let eagain = Fault::Raw(libc::EAGAIN);
    for alignment in [1, ALIGN] {
        let trial = trial(
            &[
                Fault::Short,
                EIO,
                EINTR,
                Fault::Nothing,
                Fault::Short,
                eagain,
                EINTR,
            ],
            alignment,
        );
        let read = trial
            .tier
            .read(&[span(700, 40_000, 0)], piece(40_000))
            .unwrap();
        assert_eq!(read[..], trial.bytes[700..40_700]);
        assert_eq!(trial.reads.load(Ordering::SeqCst), 8);
    }
}

#[test]
#[cfg(unix)]
fn lasting_faults_are_named_with_file_and_offset() {
    for (fault, reads) in [(EIO, 6), (Fault::Nothing, 6), (EACCES, 1)] {
        let trial = trial(&vec![fault; reads as usize], 1);
        let message = trial
            .tier
            .read(&[span(700, 4000, 0)], piece(4000))
            .err()
            .unwrap()
            .to_string();
        assert!(
            message.contains("weights.gguf") && message.contains("4000 bytes at offset 700"),
            "{message}"
        );
        assert_eq!(trial.reads.load(Ordering::SeqCst), reads, "{fault:?}");
        // The next request is as good as any.
        let read = trial.tier.read(&[span(9, 40, 0)], piece(40)).unwrap();
        assert_eq!(read[..], trial.bytes[9..49]);
    }
}

#[test]
fn a_change_explains_more_than_a_failed_read() {
    let trial = trial(&[Fault::Nothing], 1);
    trial.grown.store(1, Ordering::SeqCst);
    let error = trial.tier.read(&[span(0, 9, 0)], piece(9)).err().unwrap();
    assert!(
        matches!(&error, ReadError::Changed { path, .. } if path == Path::new("weights.gguf")),
        "{error}"
    );
    assert_eq!(trial.reads.load(Ordering::SeqCst), 1);
}

/// Bytes that come at once, but for those from a certain offset on, which come when the gate is
/// opened.
struct Stalling {
    bytes: Vec<u8>,
    from: u64,
    gate: Arc<(Mutex<bool>, Condvar)>,
}

impl ReadAt for Stalling {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        if offset >= self.from {
            let mut open = self.gate.0.lock().unwrap();
            while !*open {
                open = self.gate.1.wait(open).unwrap();
            }
        }
        let rest = &self.bytes[offset as usize..];
        let n = rest.len().min(into.len());
        into[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }

    fn stamp(&self) -> io::Result<Stamp> {
        Ok(Stamp {
            len: self.bytes.len() as u64,
            modified: None,
        })
    }

    fn alignment(&self) -> usize {
        1
    }
}

#[test]
fn a_device_that_stalls_delays_nothing_else_and_is_outlived() {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let bytes = content(50_000);
    let source = Stalling {
        bytes: bytes.clone(),
        from: 40_000,
        gate: Arc::clone(&gate),
    };
    let tier = FileTier::from_readers(vec![named(source)]).unwrap();
    tier.submit(99, &[span(45_000, 500, 0)], piece(500), Priority::Demand);
    // These have a lower priority, so they wait for the read that stalls.
    for key in 50..55 {
        tier.submit(
            key,
            &[span(key * 100, 100, 0)],
            piece(100),
            Priority::Background,
        );
    }
    for key in 0..30 {
        tier.submit(
            key,
            &[span(key * 1000, 1000, 0)],
            piece(1000),
            Priority::Demand,
        );
    }
    let mut seen = Vec::new();
    let mut take = |n: usize| {
        for _ in 0..n {
            let completion = tier.wait().unwrap();
            completion.result.unwrap();
            let (from, len) = match completion.key {
                99 => (45_000, 500),
                key if key >= 50 => (key as usize * 100, 100),
                key => (key as usize * 1000, 1000),
            };
            assert_eq!(completion.buffer[..], bytes[from..from + len]);
            seen.push(completion.key);
        }
        seen.sort_unstable();
        std::mem::take(&mut seen)
    };
    assert_eq!(take(30), (0..30).collect::<Vec<_>>());
    assert!(tier.poll().is_none(), "background reads must wait");
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    assert_eq!(take(6), [50, 51, 52, 53, 54, 99]);
}

/// Returns a file of which read 1 stalls until the gate opens, once that read is under way.
fn stalled() -> (FileTier, Arc<(Mutex<bool>, Condvar)>) {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let source = Stalling {
        bytes: content(50_000),
        from: 40_000,
        gate: Arc::clone(&gate),
    };
    let tier = FileTier::from_readers(vec![named(source)]).unwrap();
    tier.submit(1, &[span(45_000, 500, 0)], piece(500), Priority::Demand);
    // It is under way before the others are asked for, whoever of the readers has it.
    tier.submit(2, &[span(0, 500, 0)], piece(500), Priority::Demand);
    assert_eq!(tier.wait().unwrap().key, 2);
    (tier, gate)
}

#[test]
fn reads_for_the_next_step_go_on_beside_demand_reads() {
    let (tier, gate) = stalled();
    assert_eq!(tier.seconds_until_read(0, 500), 1000.0 / 1e9, "one is left");
    tier.submit(3, &[span(0, 500, 0)], piece(500), Priority::Idle);
    tier.submit(4, &[span(500, 500, 0)], piece(500), Priority::Next);
    assert_eq!(tier.wait().unwrap().key, 4, "beside the stalled one");
    assert!(tier.poll().is_none(), "idle reads must wait");
    tier.resolve_predicted(&[3]);
    assert_eq!(tier.wait().unwrap().key, 3, "wanted now");
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    assert_eq!(tier.wait().unwrap().key, 1);
    assert_eq!(tier.seconds_until_read(0, 0), 0.0, "nothing is left");
}

#[test]
fn a_slow_drive_keeps_no_reader_of_another() {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let source = |from| Stalling {
        bytes: content(50_000),
        from,
        gate: Arc::clone(&gate),
    };
    let drive = |from| DriveReaders {
        files: vec![named(source(from))],
        read_gbps: 1.0,
    };
    let tier = FileTier::from_drives(vec![drive(0), drive(50_000)]).unwrap();
    let on = |part, key: u64| {
        let mut span = span(key * 100, 100, 0);
        span.extent.part = part;
        tier.submit(key, &[span], piece(100), Priority::Demand);
    };
    // More than one drive has readers for.
    (0..2 * READER_THREADS as u64).for_each(|key| on(0, key));
    (100..110).for_each(|key| on(1, key));
    let mut keys: Vec<u64> = (0..10).map(|_| tier.wait().unwrap().key).collect();
    keys.sort_unstable();
    assert_eq!(keys, (100..110).collect::<Vec<_>>());
    assert!(tier.seconds_until_read(0, 1) > tier.seconds_until_read(1, 1));
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    for _ in 0..2 * READER_THREADS {
        tier.wait().unwrap().result.unwrap();
    }
}

#[test]
fn what_is_given_up_leaves_the_background_alone() {
    let (tier, gate) = stalled();
    tier.submit(3, &[span(0, 500, 0)], piece(500), Priority::Idle);
    tier.submit(4, &[span(500, 500, 0)], piece(500), Priority::Idle);
    tier.submit(5, &[span(1000, 500, 0)], piece(500), Priority::Background);
    tier.resolve_predicted(&[4]);
    let given_up = tier.wait().unwrap();
    assert!(matches!(
        (given_up.key, &given_up.result),
        (3, Err(ReadError::Stopped)) | (4, Ok(()))
    ));
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    let mut keys: Vec<(u64, bool)> = (0..3)
        .map(|_| tier.wait().unwrap())
        .map(|a| (a.key, a.result.is_ok()))
        .collect();
    keys.push((given_up.key, given_up.result.is_ok()));
    keys.sort_unstable();
    assert_eq!(keys, [(1, true), (3, false), (4, true), (5, true)]);
}

#[test]
#[cfg(unix)]
fn bytes_that_are_not_what_they_were_are_named() {
    let bytes = content(50_000);
    let compared = |checks| Finish {
        checks,
        ..Finish::default()
    };
    let check = |sum: u64| SliceChecksum {
        at: 100,
        extent: Extent {
            part: 0,
            offset: 800,
            len: 300,
        },
        sum,
        what: "expert 3 of tensor 'up'".into(),
    };
    let right = xxhash_rust::xxh3::xxh3_64(&bytes[800..1100]);
    let trial = trial(&[], 1);
    let spans = [span(700, 400, 0)];
    let read = trial
        .tier
        .read_finished(&spans, compared(vec![check(right)]), piece(400))
        .unwrap();
    assert_eq!(read[..], bytes[700..1100]);
    let error = trial
        .tier
        .read_finished(&spans, compared(vec![check(right), check(7)]), piece(400))
        .err()
        .unwrap()
        .to_string();
    for word in [
        "weights.gguf",
        "expert 3 of tensor 'up'",
        "300 bytes at offset 800",
        &format!("{right:016x}"),
    ] {
        assert!(error.contains(word), "{word}: {error}");
    }
    // A read that failed says why, not that its bytes are wrong.
    let failing = super::tests::trial(&[EACCES], 1);
    let error = failing
        .tier
        .read_finished(&spans, compared(vec![check(7)]), piece(400))
        .err()
        .unwrap();
    assert!(matches!(error, ReadError::Io { .. }), "{error}");
}
