//! A client of HTTP in a few lines.

use super::*;
use crate::common::stderr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStderr, Command};

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server that runs.
pub struct Served {
    pub child: Child,
    pub port: u16,
    log: Option<BufReader<ChildStderr>>,
    begun: String,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

/// A connection whose answer is still coming.
pub struct Stream(BufReader<TcpStream>);

impl Served {
    /// Starts a server with the bundled model on a free port, and waits until it is ready.
    pub fn start(more: &[&str]) -> Self {
        let model = demo_model();
        Self::with(&[&[model.to_str().unwrap()], more].concat())
    }

    pub fn with(args: &[&str]) -> Self {
        Self::by(tier_plan(), args)
    }

    /// Starts a server by a command without arguments.
    pub fn by(mut command: Command, args: &[&str]) -> Self {
        command.arg("serve").args(args).args(["--port", "0"]);
        let mut child = piped(&mut command);
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut begun = String::new();
        while !begun.contains(": ready") {
            let before = begun.len();
            log.read_line(&mut begun).unwrap();
            if begun.len() == before {
                let output = child.wait_with_output().unwrap();
                panic!("the server ended: {begun}{}", stderr(&output));
            }
        }
        let address = begun.rsplit("http://127.0.0.1:").next().unwrap();
        let port = address.split(':').next().unwrap().parse().unwrap();
        Self {
            child,
            port,
            log: Some(log),
            begun,
        }
    }

    /// Ends the server and returns its log.
    pub fn stop(&mut self) -> String {
        send("-TERM", &self.child);
        let mut log = std::mem::take(&mut self.begun);
        if let Some(mut rest) = self.log.take() {
            rest.read_to_string(&mut log).unwrap();
        }
        self.child.wait().unwrap();
        log
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn write(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
        let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
        if !headers.iter().any(|(name, _)| *name == "Host") {
            head += "Host: localhost\r\n";
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("Content-Length: {}\r\n\r\n", body.len());
        let mut stream = self.connect();
        // A server that refuses early may close before it has the whole body.
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.write_all(body);
        stream
    }

    pub fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        Answer::read(self.write(method, path, headers, body))
    }

    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        let kind = [("Content-Type", "application/json")];
        self.ask("POST", path, &kind, body.to_string().as_bytes())
    }

    /// Sends these bytes alone, and returns what comes.
    pub fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut came = Vec::new();
        let _ = stream.read_to_end(&mut came);
        String::from_utf8_lossy(&came).into_owned()
    }

    /// Gets an answer that is read as it comes.
    pub fn open_with(&self, path: &str, headers: &[(&str, &str)]) -> Stream {
        Stream(BufReader::new(self.write("GET", path, headers, b"")))
    }

    /// Asks for an answer that is read as it comes.
    pub fn open(&self, path: &str, body: &Value) -> Stream {
        Stream(BufReader::new(self.write(
            "POST",
            path,
            &[],
            body.to_string().as_bytes(),
        )))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Stream {
    /// Reads up to a line with this word.
    pub fn read_until(&mut self, word: &str) {
        let mut line = String::new();
        while !line.contains(word) {
            line.clear();
            assert_ne!(self.0.read_line(&mut line).unwrap(), 0, "no {word:?}");
        }
    }

    /// Reads the next event, and returns its data.
    pub fn event(&mut self) -> Value {
        loop {
            let mut line = String::new();
            assert_ne!(self.0.read_line(&mut line).unwrap(), 0, "no event");
            if let Some(data) = line.strip_prefix("data: ") {
                return serde_json::from_str(data).unwrap();
            }
        }
    }

    pub fn rest(mut self) -> String {
        let mut rest = Vec::new();
        let _ = self.0.read_to_end(&mut rest);
        String::from_utf8_lossy(&rest).into_owned()
    }
}

impl Answer {
    fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n");
        let end = end.unwrap_or_else(|| panic!("no answer: {:?}", String::from_utf8_lossy(&bytes)));
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let mut lines = head.lines();
        let status = lines
            .next()
            .unwrap()
            .split(' ')
            .nth(1)
            .unwrap()
            .parse()
            .unwrap();
        let headers: Vec<(String, String)> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_lowercase(), value.to_string()))
            .collect();
        let body = bytes[end + 4..].to_vec();
        let is_chunked = headers
            .iter()
            .any(|(n, v)| n == "transfer-encoding" && v == "chunked");
        Self {
            status,
            body: if is_chunked { unchunked(&body) } else { body },
            headers,
        }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.text()))
    }

    /// Returns the body of an answer that must be good.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }

    /// Returns the events of a stream: the name, if any, and the data.
    pub fn events(&self) -> Vec<(Option<String>, Value)> {
        assert_eq!(
            self.header("content-type"),
            Some("text/event-stream"),
            "{}",
            self.text()
        );
        let text = self.text();
        let parts = text
            .split("\n\n")
            .filter(|part| !part.is_empty() && !part.starts_with(':'));
        parts
            .map(|part| {
                let field = |name: &str| part.lines().find_map(|l| l.strip_prefix(name));
                let data = field("data: ").unwrap_or_else(|| panic!("{part:?}"));
                let value = serde_json::from_str(data).unwrap_or_else(|_| data.into());
                (field("event: ").map(str::to_string), value)
            })
            .collect()
    }
}

fn unchunked(mut body: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    loop {
        let end = body.windows(2).position(|w| w == b"\r\n").expect("a chunk");
        let size = usize::from_str_radix(std::str::from_utf8(&body[..end]).unwrap(), 16).unwrap();
        if size == 0 {
            return whole;
        }
        whole.extend_from_slice(&body[end + 2..end + 2 + size]);
        body = &body[end + 2 + size + 2..];
    }
}
