//! Files that are either whole or not there: written under a temporary name, then renamed.
