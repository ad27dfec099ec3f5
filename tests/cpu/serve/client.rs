//! A client that can also do what no library would.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

/// For one answer of a tiny model: a hang is seen, a loaded machine passes.
pub(super) const LIMIT: Duration = Duration::from_mins(1);
pub(super) const IMAGES: &str = "/v1/images/generations";

/// An answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(super) status: u16,
    head: String,
    pub(super) body: Vec<u8>,
}

impl Reply {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    /// The JSON of an answer with this status.
    #[track_caller]
    pub(crate) fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text());
        self.json()
    }

    /// Checks a refusal: its status and a word of its message; gives the field that it names.
    #[track_caller]
    pub(super) fn refuses(&self, status: u16, word: &str) -> Option<String> {
        let body = self.expect(status);
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains(word), "`{word}` is not in: {message}");
        assert!(body["error"]["code"].is_string() && body["error"]["type"].is_string(), "{body}");
        body["error"]["param"].as_str().map(ToOwned::to_owned)
    }
}

pub(super) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address, LIMIT).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Sends bytes and reads what comes until the end; `None` when nothing does.
pub(super) fn raw(address: SocketAddr, bytes: &[u8]) -> Option<Reply> {
    let mut stream = connect(address);
    // The server may close while a refused request is still being sent.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    parse(&answer)
}

fn parse(answer: &[u8]) -> Option<Reply> {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let body = &answer[end + 4..];
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Some(Reply { status, body: if chunked { unchunk(body) } else { body.to_vec() }, head })
}

fn unchunk(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|w| w == b"\r\n") {
        let size = usize::from_str_radix(&String::from_utf8_lossy(&rest[..end]), 16).unwrap_or(0);
        rest = &rest[end + 2..];
        if size == 0 || rest.len() < size {
            break;
        }
        body.extend(&rest[..size]);
        rest = rest.get(size + 2..).unwrap_or_default();
    }
    body
}

pub(super) fn head(method: &str, path: &str, headers: &str, length: usize) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nhost: here\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n"
    )
}

/// One request on a connection of its own.
#[track_caller]
pub(super) fn send(address: SocketAddr, method: &str, path: &str, headers: &str, body: &[u8]) -> Reply {
    let mut bytes = head(method, path, headers, body.len()).into_bytes();
    bytes.extend(body);
    raw(address, &bytes).unwrap_or_else(|| panic!("{method} {path} got no answer"))
}

#[track_caller]
pub(super) fn get(address: SocketAddr, path: &str) -> Reply {
    send(address, "GET", path, "", b"")
}

#[track_caller]
pub(crate) fn post(address: SocketAddr, path: &str, body: &Value) -> Reply {
    send(address, "POST", path, "content-type: application/json\r\n", body.to_string().as_bytes())
}

/// The PNG of each image of an answer.
#[track_caller]
pub(super) fn pictures(body: &Value) -> Vec<Vec<u8>> {
    let data = body["data"].as_array().unwrap_or_else(|| panic!("{body}"));
    data.iter().map(|d| decode(d["b64_json"].as_str().unwrap())).collect()
}

/// Base64.
pub(super) fn decode(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.bytes().filter(|b| *b != b'=');
    let digits: Vec<u32> = digits.map(|b| ALPHABET.iter().position(|a| *a == b).unwrap() as u32).collect();
    let bytes = digits.chunks(4).flat_map(|four| {
        let word = four.iter().enumerate().fold(0, |word, (i, d)| word | d << (18 - 6 * i));
        [(word >> 16) as u8, (word >> 8) as u8, word as u8]
            .into_iter()
            .take(four.len() - 1)
            .collect::<Vec<_>>()
    });
    bytes.collect()
}

/// A counter of `/metrics`, summed over its labels.
pub(super) fn counter(address: SocketAddr, name: &str) -> f64 {
    let text = get(address, "/metrics").text();
    let of = |line: &&str| line.split(['{', ' ']).next() == Some(name);
    let values = text.lines().filter(of).map(|l| l.rsplit(' ').next().unwrap().parse::<f64>().unwrap());
    values.sum()
}

/// Waits until something holds.
#[track_caller]
pub(super) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LIMIT, "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Events of a stream, as they come.
pub(super) struct Events(BufReader<TcpStream>);

impl Events {
    /// Asks for a stream and reads its head.
    #[track_caller]
    pub(super) fn open(address: SocketAddr, body: &Value) -> Self {
        let mut stream = connect(address);
        let body = body.to_string();
        let head = head("POST", IMAGES, "content-type: application/json\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).unwrap();
        let mut events = Self(BufReader::new(stream));
        let status = events.line().unwrap();
        assert!(status.contains(" 200 "), "{status}");
        while events.line().is_some_and(|line| !line.is_empty()) {}
        events
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = self.0.read_line(&mut line).unwrap();
        (read > 0).then(|| line.trim_end().to_owned())
    }
}

impl Iterator for Events {
    type Item = Value;

    /// The next event's data; `[DONE]` as a string.
    fn next(&mut self) -> Option<Value> {
        loop {
            let line = self.line()?;
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(serde_json::from_str(data).unwrap_or_else(|_| Value::from(data)));
            }
        }
    }
}
