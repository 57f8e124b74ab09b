//! A connection of a client that may read slowly, or leave.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

/// Longest wait for a part of an answer.
const PATIENCE: Duration = Duration::from_secs(300);

/// A connection that was idle for longer than this may be one that the server closes now.
const IDLE: Duration = Duration::from_secs(10);

/// How an answer is read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pace {
    /// Whether a few bytes are read at a time, with pauses.
    pub is_slow: bool,
    /// Bytes after which the client leaves.
    pub leave_after: Option<usize>,
}

/// Reads at some pace.
struct Paced {
    stream: TcpStream,
    pace: Pace,
    /// Bytes that are read slowly; a client is not slow for longer than that.
    slow_left: usize,
}

impl Read for Paced {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut most = buffer.len();
        if let Some(left) = self.pace.leave_after {
            if left == 0 {
                return Err(io::Error::other("the client leaves"));
            }
            most = most.min(left);
        }
        if self.pace.is_slow && self.slow_left > 0 {
            thread::sleep(Duration::from_millis(10));
            most = most.min(64);
        }
        let n = self.stream.read(&mut buffer[..most])?;
        self.slow_left = self.slow_left.saturating_sub(n);
        if let Some(left) = &mut self.pace.leave_after {
            *left -= n;
        }
        Ok(n)
    }
}

/// An answer.
#[derive(Debug, Default)]
pub struct Answer {
    pub status: u16,
    pub retry_after: Option<u64>,
    pub is_stream: bool,
    pub body: Vec<u8>,
    is_last: bool,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A connection that is used for one request after the other.
pub struct Connection {
    reader: BufReader<Paced>,
    used: Instant,
    is_closed: bool,
}

impl Connection {
    pub fn open(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let paced = Paced {
            stream,
            pace: Pace::default(),
            slow_left: 0,
        };
        Self {
            reader: BufReader::new(paced),
            used: Instant::now(),
            is_closed: false,
        }
    }

    /// Whether another request can be sent.
    pub fn is_open(&self) -> bool {
        !self.is_closed && self.used.elapsed() < IDLE
    }

    /// Sends a request, or its first bytes.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.reader.get_mut().stream.write_all(bytes)
    }

    /// Sends a request and reads its answer.
    pub fn exchange(&mut self, path: &str, body: &str, pace: Pace) -> io::Result<Answer> {
        self.send(request(path, body).as_bytes())?;
        self.answer(pace)
    }

    /// Reads an answer.
    pub fn answer(&mut self, pace: Pace) -> io::Result<Answer> {
        let paced = self.reader.get_mut();
        (paced.pace, paced.slow_left) = (pace, 4 << 10);
        let answer = self.read();
        self.is_closed = answer.as_ref().map_or(true, |answer| answer.is_last);
        self.used = Instant::now();
        answer
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        match line.strip_suffix("\r\n") {
            Some(line) => Ok(line.to_string()),
            None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, line)),
        }
    }

    fn read(&mut self) -> io::Result<Answer> {
        let mut answer = Answer::default();
        let head = self.line()?;
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
        answer.status = status.ok_or_else(|| io::Error::other(head))?;
        let (mut n_bytes, mut is_chunked) = (0, false);
        loop {
            let line = self.line()?.to_lowercase();
            let Some((name, value)) = line.split_once(": ") else {
                break;
            };
            match name {
                "content-length" => n_bytes = value.parse().map_err(io::Error::other)?,
                "transfer-encoding" => is_chunked = value == "chunked",
                "retry-after" => answer.retry_after = value.parse().ok(),
                "content-type" => answer.is_stream = value == "text/event-stream",
                "connection" => answer.is_last = value == "close",
                _ => {}
            }
        }
        if !is_chunked {
            answer.body.resize(n_bytes, 0);
            self.reader.read_exact(&mut answer.body)?;
            return Ok(answer);
        }
        loop {
            let n = usize::from_str_radix(&self.line()?, 16).map_err(io::Error::other)?;
            let start = answer.body.len();
            answer.body.resize(start + n, 0);
            self.reader.read_exact(&mut answer.body[start..])?;
            self.line()?;
            if n == 0 {
                return Ok(answer);
            }
        }
    }
}

/// Returns the bytes of a request.
pub fn request(path: &str, body: &str) -> String {
    let method = if body.is_empty() { "GET" } else { "POST" };
    let n = body.len();
    format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {n}\r\n\r\n{body}")
}
