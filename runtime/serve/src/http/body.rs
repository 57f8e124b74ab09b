//! Receiving bodies, of bounded size and in bounded time.

use crate::error::ApiError;
use crate::state::State;
use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderMap, StatusCode, header};
use std::future::poll_fn;
use std::pin::Pin;

/// Receives a whole body.
///
/// # Errors
/// When the model is not ready, or the body is too large, too slow, or broken off.
pub(crate) async fn read(
    state: &State,
    headers: &HeaderMap,
    body: Body,
) -> Result<Vec<u8>, ApiError> {
    if state.is_stopping() {
        return Err(ApiError::stopping());
    }
    if state.loaded().is_none() {
        return Err(ApiError::loading(state.progress()));
    }
    let most = state.config.limits.max_body_bytes;
    let said = headers.get(header::CONTENT_LENGTH);
    let said = said.and_then(|n| n.to_str().ok()?.parse::<u64>().ok());
    if said.is_some_and(|n| n > most as u64) {
        return Err(too_large(most));
    }
    let Ok(_turn) = state.reading.acquire().await else {
        return Err(ApiError::stopping());
    };
    let time = state.config.limits.body_time;
    let Ok(bytes) = tokio::time::timeout(time, collect(body, most)).await else {
        let message = format!("the body took more than {} s", time.as_secs());
        return Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "timeout",
            message,
        ));
    };
    bytes
}

async fn collect(mut body: Body, most: usize) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let frame = frame.map_err(|e| ApiError::invalid(format!("the body broke off: {e}")))?;
        let Ok::<Bytes, _>(data) = frame.into_data() else {
            continue;
        };
        if data.len() > most - bytes.len() {
            return Err(too_large(most));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

fn too_large(most: usize) -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "body_too_large",
        format!("the body has too many bytes, expected at most {most}"),
    )
}
