//! An HTTP server on 127.0.0.1 whose answers a test chooses, also wrong ones.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Path with the query.
    pub path: String,
    /// First byte asked for, and the last one, from `Range`.
    pub range: Option<(usize, Option<usize>)>,
    /// Value of `Authorization`.
    pub authorization: Option<String>,
}

/// An answer.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// Headers other than `Content-Length`.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: Vec<u8>,
    /// Bytes of the body after which the connection ends.
    pub cut: Option<usize>,
    /// Whether the connection stays open after that, without another byte.
    pub hangs: bool,
    /// `Content-Length`, where it is not the body's.
    pub length: Option<usize>,
}

impl Reply {
    /// Returns a status without a body.
    pub fn status(status: u16) -> Self {
        Self {
            status,
            ..Self::default()
        }
    }

    /// Returns all bytes.
    pub fn whole(body: &[u8]) -> Self {
        Self {
            body: body.to_vec(),
            ..Self::status(200)
        }
    }

    /// Returns the bytes that a request asks for, or all.
    pub fn ranged(request: &Request, body: &[u8]) -> Self {
        let Some((first, last)) = request.range else {
            return Self::whole(body);
        };
        if first >= body.len() {
            return Self::status(416);
        }
        let end = last.map_or(body.len(), |last| body.len().min(last + 1));
        let range = format!("bytes {first}-{}/{}", end - 1, body.len());
        Self {
            body: body[first..end].to_vec(),
            ..Self::status(206).with("content-range", &range)
        }
    }

    /// Adds a header.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_string(), value.to_string()));
        self
    }
}

/// A running server. It ends with the test's process.
pub struct Server {
    address: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Starts a server that answers as `answer` says.
    ///
    /// # Panics
    /// When there is no free port.
    pub fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address");
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, answer) = (Arc::clone(&requests), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, answer) = (Arc::clone(&seen), Arc::clone(&answer));
                std::thread::spawn(move || {
                    // A client may end the connection before everything is sent.
                    let _ = converse(stream, &seen, &*answer);
                });
            }
        });
        Self {
            address: format!("http://{address}"),
            requests,
        }
    }

    /// Returns the address, without a slash at its end.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns the requests so far.
    pub fn requests(&self) -> Vec<Request> {
        let requests = self.requests.lock();
        requests.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn converse(
    stream: TcpStream,
    seen: &Mutex<Vec<Request>>,
    answer: &dyn Fn(&Request) -> Reply,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_string();
    let (mut range, mut authorization) = (None, None);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let bounds = value.strip_prefix("bytes=").unwrap_or_default();
                let (first, last) = bounds.split_once('-').unwrap_or_default();
                range = first.parse().ok().map(|first| (first, last.parse().ok()));
            }
            "authorization" => authorization = Some(value.to_string()),
            _ => {}
        }
    }
    let request = Request {
        path,
        range,
        authorization,
    };
    seen.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(request.clone());
    let reply = answer(&request);
    let mut stream = stream;
    let length = reply.length.unwrap_or(reply.body.len());
    let mut head = format!(
        "HTTP/1.1 {} X\r\ncontent-length: {length}\r\n",
        reply.status
    );
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("connection: close\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    let sent = reply.cut.unwrap_or(reply.body.len()).min(reply.body.len());
    stream.write_all(&reply.body[..sent])?;
    stream.flush()?;
    if reply.hangs {
        // Until the client ends it.
        reader.read_line(&mut line)?;
    }
    Ok(())
}
