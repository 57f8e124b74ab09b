//! Receiving bodies, of bounded size and in bounded time.

use crate::error::ApiError;
use crate::state::State;
use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderMap, StatusCode, header};
use std::error::Error;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::time::Duration;

/// Time for what is received of a body that is refused.
const DRAIN_TIME: Duration = Duration::from_secs(5);

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
        drain(body, most).await;
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
        let frame = frame.map_err(|error| broken(&error))?;
        let Ok::<Bytes, _>(data) = frame.into_data() else {
            continue;
        };
        if data.len() > most - bytes.len() {
            drop(bytes);
            drain(body, most).await;
            return Err(too_large(most));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

/// Returns the error of a body that did not come whole: its client left, or it is no HTTP.
fn broken(error: &axum::Error) -> ApiError {
    let first: &dyn Error = error;
    let mut causes = std::iter::successors(Some(first), |cause| (**cause).source());
    let has_left = causes.any(|cause| {
        let hyper = cause.downcast_ref::<hyper::Error>();
        let io = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        hyper.is_some_and(hyper::Error::is_incomplete_message)
            || matches!(
                io,
                Some(ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset)
            )
    });
    match has_left {
        true => ApiError::client_left(),
        false => ApiError::invalid(format!("the body broke off: {error}")),
    }
}

/// Receives some of what is refused and drops it: many clients read the answer only after they have
/// sent all.
async fn drain(mut body: Body, most: usize) {
    let mut left = most;
    let all = async {
        while let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            let len = frame.into_data().map_or(0, |data| data.len());
            match left.checked_sub(len) {
                Some(rest) => left = rest,
                None => return,
            }
        }
    };
    let _ = tokio::time::timeout(DRAIN_TIME, all).await;
}

fn too_large(most: usize) -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "body_too_large",
        format!("the body has too many bytes, expected at most {most}"),
    )
}
