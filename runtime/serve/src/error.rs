//! Errors of requests in the forms of both protocols.

use crate::ask::CLIENT_LEFT;
use crate::job::Failure;
use crate::prompts::Unencoded;
use crate::request::{BadLine, Code};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tier_plan_runtime::printable::one_line;

/// Protocol of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Protocol {
    #[default]
    OpenAi,
    Anthropic,
}

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    /// One word for programs, as OpenAI's `code`.
    pub code: &'static str,
    pub message: String,
    /// Seconds after which a client may try again.
    pub retry_after: Option<u64>,
    pub protocol: Protocol,
}

/// The message of an error, for the log.
#[derive(Debug, Clone)]
pub(crate) struct Logged(pub String);

impl ApiError {
    pub fn new(status: StatusCode, code: &'static str, message: impl AsRef<str>) -> Self {
        Self {
            status,
            code,
            message: one_line(message.as_ref()).into_owned(),
            retry_after: None,
            protocol: Protocol::OpenAi,
        }
    }

    pub fn invalid(message: impl AsRef<str>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", message)
    }

    pub fn stopping() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "shutting_down",
            "the server is shutting down",
        )
    }

    /// Returns the error of a request whose client left while it sent the body.
    pub fn client_left() -> Self {
        let status = StatusCode::from_u16(CLIENT_LEFT).unwrap_or(StatusCode::BAD_REQUEST);
        Self::new(status, "client_left", "the body broke off")
    }

    pub fn loading(progress: f64) -> Self {
        let message = format!("the model is loading: {:.0} % done", progress * 100.0);
        Self {
            retry_after: Some(5),
            ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "loading_model", message)
        }
    }

    pub fn overloaded(message: impl AsRef<str>, retry_after: u64) -> Self {
        Self {
            retry_after: Some(retry_after),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message)
        }
    }

    /// Returns the error of a question that only the end of a step can answer.
    pub fn slow_step() -> Self {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        Self::new(status, "step_takes_long", "a step takes long; try again")
    }

    pub fn of(self, protocol: Protocol) -> Self {
        Self { protocol, ..self }
    }

    /// Returns the word for the kind of error that the protocol has.
    fn kind(&self) -> &'static str {
        let anthropic = self.protocol == Protocol::Anthropic;
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 if anthropic => "request_too_large",
            429 => "rate_limit_error",
            501 => "not_supported_error",
            503 if anthropic => "overloaded_error",
            503 => "unavailable_error",
            500.. if anthropic => "api_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// Returns the body.
    pub fn body(&self) -> Value {
        match self.protocol {
            Protocol::Anthropic => json!({
                "type": "error",
                "error": { "type": self.kind(), "message": self.message },
            }),
            Protocol::OpenAi => json!({
                "error": {
                    "message": self.message,
                    "type": self.kind(),
                    "param": self.param(),
                    "code": self.code,
                },
            }),
        }
    }

    /// Returns the field that is at fault: what the message begins with, if that is a name.
    fn param(&self) -> Option<&str> {
        let (name, _) = self.message.split_once(": ")?;
        let is_name = !name.is_empty() && !name.contains(char::is_whitespace);
        (self.status == StatusCode::BAD_REQUEST && is_name).then_some(name)
    }
}

impl From<BadLine> for ApiError {
    fn from(bad: BadLine) -> Self {
        let status = match bad.code {
            Code::ServerError => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::BAD_REQUEST,
        };
        Self::new(status, bad.code.name(), bad.message)
    }
}

impl From<Unencoded> for ApiError {
    fn from(error: Unencoded) -> Self {
        match error {
            Unencoded::Bad(bad) => bad.into(),
            Unencoded::Interrupted => Self::stopping(),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::TooLong(message) => Self::new(
                StatusCode::BAD_REQUEST,
                Code::ContextLengthExceeded.name(),
                message,
            ),
            Failure::Grammar(message) => Self::invalid(message),
            Failure::Stopping => Self::stopping(),
            Failure::Engine(message) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = json_response(self.status, &self.body());
        if let Some(seconds) = self.retry_after {
            let seconds = HeaderValue::from(seconds);
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let how = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, how);
        }
        response.extensions_mut().insert(Logged(self.message));
        response
    }
}

/// Returns a response with a body of JSON.
pub(crate) fn json_response(status: StatusCode, body: &Value) -> Response {
    let kind = [(header::CONTENT_TYPE, "application/json")];
    (status, kind, body.to_string()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_form_of_their_protocol() {
        let bad = BadLine::new(Code::Unsupported, "tools: an array is not supported");
        let error = ApiError::from(bad);
        let body = error.body();
        assert_eq!(error.status, 400);
        assert_eq!(body["error"]["param"], "tools");
        assert_eq!(body["error"]["code"], "unsupported");
        assert_eq!(body["error"]["type"], "invalid_request_error");
        let body = ApiError::overloaded("full", 3)
            .of(Protocol::Anthropic)
            .body();
        assert_eq!(
            (&body["type"], &body["error"]["type"]),
            (&json!("error"), &json!("rate_limit_error"))
        );
        assert_eq!(ApiError::stopping().body()["error"]["param"], Value::Null);
        assert_eq!(ApiError::invalid("a\u{1b}b").message, r"a\u001bb");
    }
}
