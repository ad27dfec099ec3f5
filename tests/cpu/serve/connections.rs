//! Connections: kept for clients and proxies that use them again, and never in the way of a probe.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use mudit::serve::ServeOptions;
use mudit::serve::http::Limits;
use mudit::serve::http::auth::Keys;
use serde_json::json;

use super::client::{Events, IMAGES, connect, get, post, raw, send};
use super::{Running, options};

fn options_of(change: impl FnOnce(&mut Limits)) -> ServeOptions {
    let mut options = options();
    change(&mut options.limits);
    options
}

const PROBE: &str = "GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n";

/// Asks once more on a kept connection; the head of the answer, or nothing where it was closed.
fn again(stream: &mut TcpStream) -> String {
    let _ = stream.write_all(PROBE.as_bytes());
    let mut answer = [0; 4096];
    let n = stream.read(&mut answer).unwrap_or(0);
    String::from_utf8_lossy(&answer[..n]).into_owned()
}

#[test]
fn idle_connections_are_kept_longer_than_requests_may_be_late() {
    let server = Running::start(options_of(|limits| {
        limits.read_time = Duration::from_millis(300);
        limits.keep_alive = Duration::from_secs(2);
    }));
    let at = server.address();
    let mut fresh = connect(at);
    let mut kept = connect(at);
    assert!(again(&mut kept).contains("keep-alive: timeout=2\r\n"));
    sleep(Duration::from_millis(900));
    for stream in [&mut kept, &mut fresh] {
        assert!(again(stream).starts_with("HTTP/1.1 200"));
    }
    // A request that has begun is not waited for so long, be it the first of a connection or a later one.
    for mut stream in [connect(at), kept] {
        let start = Instant::now();
        stream.write_all(b"GET /health HTTP/1.1\r\nx-slow: ").unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    }
    // In the end, it is closed; a client that says so first is told nothing.
    let start = Instant::now();
    let _ = fresh.read_to_end(&mut Vec::new());
    assert!((2.0..10.0).contains(&start.elapsed().as_secs_f64()), "{:?}", start.elapsed());
    assert_eq!(get(at, "/health").header("keep-alive"), None);

    let server = Running::start(options_of(|limits| limits.keep_alive = Duration::ZERO));
    let reply = raw(server.address(), PROBE.as_bytes()).unwrap();
    assert_eq!((reply.status, reply.header("keep-alive")), (200, None));
}

#[test]
fn a_crowd_of_connections_does_not_keep_a_probe_waiting() {
    let server = Running::start(options_of(|limits| limits.connections = 8));
    let at = server.address();
    let probe = |what: &str| {
        let start = Instant::now();
        assert_eq!(get(at, "/v2/health/live").status, 200, "{what}");
        assert!(start.elapsed() < Duration::from_secs(4), "{what}: {:?}", start.elapsed());
    };
    // Connections that say nothing, that stop in the middle of a head, and that were used and kept.
    let silent: Vec<_> = (0..100).map(|_| connect(at)).collect();
    probe("silent");
    let mut slow: Vec<_> = (0..100).map(|_| connect(at)).collect();
    for stream in &mut slow {
        stream.write_all(b"GET /v2/he").unwrap();
    }
    probe("slow");
    let mut used: Vec<_> = (0..40).map(|_| connect(at)).collect();
    for stream in &mut used {
        assert!(again(stream).starts_with("HTTP/1.1 200"));
    }
    probe("used");
    post(at, IMAGES, &json!({"class_label": 1, "steps": 1})).expect(200);
    drop((silent, slow, used));
    // Requests that are being answered keep their places, and the probe is answered all the same.
    let long = json!({"class_label": 0, "steps": 1000, "n": 10, "stream": true});
    let mut streams: Vec<_> = (0..8).map(|_| Events::open(at, &long)).collect();
    probe("streams");
    std::thread::scope(|scope| {
        // Others wait for a place, and get it when one is free.
        let waiting = scope.spawn(|| post(at, IMAGES, &json!({"class_label": 1, "steps": 1})).status);
        probe("streams, and one that waits");
        assert!(streams.iter_mut().all(|events| events.next().is_some()), "a stream was cut");
        streams.clear();
        assert_eq!(waiting.join().unwrap(), 200);
    });
}

#[test]
fn all_addresses_of_a_name_are_listened_on() {
    let mut both = options();
    both.addresses = vec![SocketAddr::from(([127, 0, 0, 1], 0)), SocketAddr::from(([127, 0, 0, 2], 0))];
    let server = Running::start(both);
    let port = server.address().port();
    for host in [[127, 0, 0, 1], [127, 0, 0, 2]] {
        assert_eq!(get(SocketAddr::from((host, port)), "/health").status, 200, "{host:?}");
    }
}

#[test]
fn pages_of_other_origins_ask_where_they_are_let() {
    let preflight = |at: SocketAddr, origin: &str| {
        let headers = format!(
            "origin: {origin}\r\naccess-control-request-method: POST\r\n\
             access-control-request-headers: authorization,content-type,x-stainless-lang\r\n"
        );
        send(at, "OPTIONS", IMAGES, &headers, b"")
    };
    let closed = Running::start(options());
    assert_eq!(
        preflight(closed.address(), "http://localhost:3000").header("access-control-allow-origin"),
        None
    );
    drop(closed);
    let mut open = options_of(|limits| {
        limits.origins = ["http://localhost:3000", "https://a.example"].map(|o| o.parse().unwrap()).to_vec();
    });
    open.keys = Keys::parse("first-key-0123456789").unwrap();
    let server = Running::start(open);
    let at = server.address();
    for origin in ["http://localhost:3000", "https://a.example"] {
        // It is answered without a key: browsers send none with it.
        let reply = preflight(at, origin);
        assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, Some(origin)));
        assert!(reply.header("access-control-allow-methods").unwrap().contains("POST"));
        assert!(reply.header("access-control-allow-headers").unwrap().contains("x-stainless-lang"));
        assert!(reply.header("access-control-max-age").is_some());
        let headers = format!("origin: {origin}\r\ncontent-type: application/json\r\n");
        // Refusals can be read by the page, too.
        let refused = send(at, "POST", IMAGES, &headers, b"{}");
        assert_eq!((refused.status, refused.header("access-control-allow-origin")), (401, Some(origin)));
        assert!(refused.header("access-control-expose-headers").unwrap().contains("retry-after"));
    }
    for origin in
        ["http://localhost:3001", "https://localhost:3000", "http://localhost:3000.evil.example", "null"]
    {
        assert_eq!(preflight(at, origin).header("access-control-allow-origin"), None, "{origin}");
    }
}
