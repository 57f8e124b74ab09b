//! `/openapi.json`: the interface as an OpenAPI 3.1 document.
//!
//! Tests hold it to the [table of endpoints](crate::http::routes) and to what is read of bodies, in
//! both directions: a field that is read and not described fails, and so does the reverse.

use axum::http::header;
use axum::response::{IntoResponse, Response};

/// Path of the document, which needs no key.
pub(crate) const PATH: &str = "/openapi.json";

const TEXT: &str = include_str!("openapi.json");

/// Answers with the document.
pub(crate) async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], TEXT).into_response()
}

#[cfg(test)]
mod tests;
