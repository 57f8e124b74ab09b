//! The listener and its connections.

pub(crate) mod body;
mod guard;
mod key;
pub(crate) mod routes;

use crate::error::ApiError;
use crate::job::Command;
use crate::page;
use crate::state::{Setup, State};
use crate::traces::Traces;
use crate::truth::Promise;
use crate::work::{Summary, work};
use axum::Router;
use axum::http::StatusCode;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::future::poll_fn;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;
use tier_plan_runtime::batcher::Batcher;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How often the listener looks whether the server should end.
const POLL: Duration = Duration::from_millis(50);

/// Time that connections have to send what is left when the server ends.
const CLOSING: Duration = Duration::from_secs(2);

/// Time in which a client may send on when it has its answer, and how many bytes.
const LINGERING: Duration = Duration::from_secs(2);
const MAX_LINGERING_BYTES: usize = 1 << 20;

/// Bytes of a request's headers, and what is buffered per connection.
const MAX_HEADER_BYTES: usize = 64 << 10;

/// Headers of a request.
const MAX_HEADERS: usize = 100;

/// Threads that check and tokenize bodies.
const BLOCKING_THREADS: usize = 4;

/// A server: it listens from the start, and answers once the model is loaded.
pub struct Server {
    state: Arc<State>,
    inbox: Receiver<Command>,
    listener: JoinHandle<io::Result<()>>,
    closing: watch::Sender<bool>,
}

impl Server {
    /// Starts to listen.
    ///
    /// # Errors
    /// When the system refuses a thread, or the listener.
    pub fn start(listener: TcpListener, setup: Setup) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let (sender, inbox) = channel();
        let state = Arc::new(State::new(setup, sender));
        let (closing, closed) = watch::channel(false);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(BLOCKING_THREADS)
            .build()?;
        let shared = Arc::clone(&state);
        let listener = std::thread::Builder::new()
            .name("http".into())
            .spawn(move || runtime.block_on(listen(listener, shared, closed)))?;
        Ok(Self {
            state,
            inbox,
            listener,
            closing,
        })
    }

    /// Returns a callback for the bytes of the model that are loaded, and all of them.
    pub fn progress(&self) -> impl Fn(u64, u64) + Send + Sync + 'static {
        let state = Arc::clone(&self.state);
        move |done, total| state.set_progress(done, total)
    }

    /// Answers requests with a loaded model until a signal asks for an end. Texts at work have a
    /// while to end then. Calls `on_ready` once requests are taken. What texts choose is recorded in
    /// `traces`, if given.
    ///
    /// # Errors
    /// When the listener fails.
    pub fn work(
        self,
        batcher: &mut Batcher<'_>,
        traces: Option<&mut Traces>,
        on_ready: impl FnOnce(),
    ) -> io::Result<Summary> {
        let promise = Promise::of(batcher.engine());
        self.state
            .ready(batcher.max_texts(), batcher.pages().total, promise);
        on_ready();
        let summary = work(&self.state, batcher, &self.inbox, traces);
        drop(self.inbox);
        // Connections have their answers; they end when those are sent.
        let _ = self.closing.send(true);
        match self.listener.join() {
            Ok(ended) => ended.map(|()| summary),
            Err(_) => Err(io::Error::other("the thread that listens has stopped")),
        }
    }
}

/// Returns the endpoints.
fn router(state: &Arc<State>) -> Router {
    routes::router()
        .merge(page::routes())
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(axum::middleware::from_fn_with_state(
            Arc::clone(state),
            guard::guard,
        ))
        .with_state(Arc::clone(state))
}

async fn no_such_path() -> ApiError {
    let message = "no such path, expected one of docs/SERVING.md, such as /v1/chat/completions";
    ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
}

async fn no_such_method() -> ApiError {
    let message = "no such method at this path";
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        message,
    )
}

/// Takes connections until the server ends.
async fn listen(
    listener: TcpListener,
    state: Arc<State>,
    closed: watch::Receiver<bool>,
) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let router = router(&state);
    let most = state.config.limits.max_connections;
    let connections = Arc::new(Semaphore::new(most));
    tokio::spawn(watch_signals(Arc::clone(&state)));
    let mut ended = closed.clone();
    loop {
        let taken = tokio::select! {
            _ = ended.changed() => break,
            taken = listener.accept() => taken,
        };
        let Ok((stream, _)) = taken else {
            // Too many open files, for instance: others may end meanwhile.
            tokio::time::sleep(POLL).await;
            continue;
        };
        let Ok(place) = Arc::clone(&connections).try_acquire_owned() else {
            drop(stream);
            continue;
        };
        let (router, closed) = (router.clone(), closed.clone());
        tokio::spawn(connection(
            stream,
            router,
            Arc::clone(&state),
            closed,
            place,
        ));
    }
    drop(listener);
    let all = connections.acquire_many(most as u32);
    // What is not sent by then is lost.
    let _ = tokio::time::timeout(CLOSING, all).await;
    Ok(())
}

/// Serves one connection.
async fn connection(
    stream: TcpStream,
    router: Router,
    state: Arc<State>,
    mut closed: watch::Receiver<bool>,
    _place: OwnedSemaphorePermit,
) {
    // Events are small, and each is wanted at once.
    let _ = stream.set_nodelay(true);
    let service = TowerToHyperService::new(router);
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(state.config.limits.header_time)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    // Errors are the client's: it left, or spoke no HTTP.
    let ended = tokio::select! {
        ended = poll_fn(|context| connection.poll_without_shutdown(context)) => ended,
        _ = closed.changed() => {
            Pin::new(&mut connection).graceful_shutdown();
            poll_fn(|context| connection.poll_without_shutdown(context)).await
        }
    };
    if ended.is_ok() {
        linger(connection.into_parts().io.into_inner()).await;
    }
}

/// Closes a connection. If what a client still sends were not read, the system would break the
/// connection off, and the client could lose the end of its answer.
async fn linger(mut stream: TcpStream) {
    if stream.shutdown().await.is_err() {
        return;
    }
    let read_rest = async {
        let (mut rest, mut left) = ([0; 4096], MAX_LINGERING_BYTES);
        while left > 0
            && let Ok(n @ 1..) = stream.read(&mut rest).await
        {
            left = left.saturating_sub(n);
        }
    };
    let _ = tokio::time::timeout(LINGERING, read_rest).await;
}

/// Stops admitting after a signal, and ends the engine's work a while later.
async fn watch_signals(state: Arc<State>) {
    while !(state.should_stop)() {
        tokio::time::sleep(POLL).await;
    }
    state.stop();
    tokio::time::sleep(state.config.limits.grace).await;
    state.cancel.request();
}
