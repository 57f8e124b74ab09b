//! Which server to ask.

use crate::client::Client;
use anyhow::{Result, ensure};
use clap::Args;

/// A running `tier-plan serve`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// Where the server is
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// Key that the server wants; better given as the variable than on the command line, which other
    /// users can see
    #[arg(long, value_name = "KEY", hide_env_values = true)]
    pub api_key: Option<String>,
}

impl ServerArgs {
    /// Checks the key, which goes into a header.
    ///
    /// # Errors
    /// When it has characters that no header may have.
    pub fn check(&self) -> Result<()> {
        self.api_key.as_deref().map_or(Ok(()), check_key)
    }

    /// Returns a client of the server.
    ///
    /// # Errors
    /// When the URL is none of a server, or the key has characters that no header may have.
    pub fn client(&self) -> Result<Client> {
        self.client_at(None)
    }

    /// Returns a client of the server at `url`, if that is given.
    ///
    /// # Errors
    /// As [`client`](Self::client).
    pub fn client_at(&self, url: Option<&str>) -> Result<Client> {
        self.check()?;
        Client::new(url.unwrap_or(&self.url), self.api_key.as_deref())
    }
}

/// Checks a server's key, which goes into a header.
///
/// # Errors
/// When it has characters that no header may have.
pub fn check_key(key: &str) -> Result<()> {
    ensure!(
        !key.is_empty() && key.bytes().all(|b| b.is_ascii_graphic()),
        "--api-key: a key with other characters, expected visible ASCII without spaces"
    );
    Ok(())
}
