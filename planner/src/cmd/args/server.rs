//! Which server to ask.

use crate::client::Client;
use anyhow::Result;
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
    /// Returns a client of the server.
    ///
    /// # Errors
    /// When the URL is none of a server.
    pub fn client(&self) -> Result<Client> {
        Client::new(&self.url, self.api_key.as_deref())
    }
}
