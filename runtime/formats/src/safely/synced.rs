//! Syncing a long file while it is written.

use std::fs::File;
use std::io;

/// Most bytes that the system holds back between two syncs.
const MAX_UNSYNCED_BYTES: u64 = 32 << 20;

/// The bytes of a growing file that are on the drive.
///
/// The system takes gigabytes faster than a drive, and a sync of them at the end can't be
/// interrupted: a program that a signal asks to end would go on for as long as that takes.
#[derive(Debug, Default)]
pub struct Synced {
    bytes: u64,
}

impl Synced {
    /// Syncs `file`, of which `written` bytes are written, if it has grown enough since the last
    /// call that did.
    ///
    /// # Errors
    /// When the drive fails or is full.
    pub fn after(&mut self, file: &File, written: u64) -> io::Result<()> {
        if written.saturating_sub(self.bytes) >= MAX_UNSYNCED_BYTES {
            file.sync_data()?;
            self.bytes = written;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_synced_as_it_grows() {
        let file = tempfile::tempfile().unwrap();
        let mut synced = Synced::default();
        synced.after(&file, MAX_UNSYNCED_BYTES - 1).unwrap();
        assert_eq!(synced.bytes, 0);
        synced.after(&file, MAX_UNSYNCED_BYTES + 5).unwrap();
        assert_eq!(synced.bytes, MAX_UNSYNCED_BYTES + 5);
        synced.after(&file, 2 * MAX_UNSYNCED_BYTES).unwrap();
        assert_eq!(synced.bytes, MAX_UNSYNCED_BYTES + 5);
    }
}
