//! Under load: nothing is lost, clients that go away or are slow cost nothing, keys hold.

use std::io::{Read as _, Write as _};
use std::thread;
use std::time::{Duration, Instant};

use mudit::serve::Server;
use mudit::serve::http::auth::Keys;
use serde_json::json;

use super::client::{Events, IMAGES, connect, counter, get, head, post, raw, send, until};
use super::{Running, flow, options};

const JSON: &str = "content-type: application/json\r\n";

#[test]
fn a_full_queue_says_when_to_come_again_and_no_answer_is_lost() {
    let mut narrow = options();
    narrow.engine.max_queue = Some(3000);
    let server = Running::start(narrow);
    let at = server.address();
    let body = json!({"class_label": 0, "steps": 250, "n": 2, "guidance_scale": 3});
    let codes = thread::scope(|scope| {
        let ask = || {
            let reply = post(at, IMAGES, &body);
            if reply.status == 429 {
                assert!(reply.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
                assert!(reply.header("retry-after-ms").unwrap().parse::<u64>().unwrap() >= 250);
                reply.refuses(429, "image-steps wait");
            }
            reply.status
        };
        let all: Vec<_> = (0..40).map(|_| scope.spawn(ask)).collect();
        all.into_iter().map(|h| h.join().unwrap()).collect::<Vec<u16>>()
    });
    let count = |code: u16| codes.iter().filter(|c| **c == code).count();
    assert_eq!(count(200) + count(429), 40, "{codes:?}");
    assert!(count(200) >= 3 && count(429) >= 1, "{codes:?}");
    assert_eq!(counter(at, "mudit_orders_refused_total"), count(429) as f64);
    assert_eq!(counter(at, "mudit_queue_image_steps"), 0.0);
    // With room again, it is taken.
    post(at, IMAGES, &body).expect(200);
}

#[test]
fn before_the_models_are_loaded_requests_are_refused() {
    let server = Server::bind(vec![flow()], options()).unwrap();
    let at = server.address();
    let reply = post(at, IMAGES, &json!({"class_label": 0}));
    assert!(reply.header("retry-after").is_some());
    reply.refuses(503, "loading");
    assert_eq!(get(at, "/v2/health/ready").status, 503);
    assert_eq!(get(at, "/v2/health/live").status, 200);
    assert_eq!(get(at, "/health").json()["status"], "loading");
    server.drain();
}

#[test]
fn a_deadline_is_kept() {
    let server = Running::start(options());
    let body = json!({"class_label": 0, "steps": 1000, "n": 10, "timeout_ms": 50});
    let start = Instant::now();
    post(server.address(), IMAGES, &body).refuses(504, "deadline");
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(counter(server.address(), "mudit_queue_image_steps"), 0.0);
}

#[test]
fn a_client_that_goes_away_frees_its_place() {
    let server = Running::start(options());
    let at = server.address();
    let body = json!({"class_label": 0, "steps": 1000, "n": 10, "stream": true, "partial_images": 5});
    // In the middle of a stream …
    let mut events = Events::open(at, &body);
    assert!(events.next().is_some());
    drop(events);
    until("the stream's end", || counter(at, "mudit_orders") == 0.0);
    // … and waiting for a whole answer.
    let mut stream = connect(at);
    let body = json!({"class_label": 0, "steps": 1000, "n": 10}).to_string();
    stream.write_all((head("POST", IMAGES, JSON, body.len()) + &body).as_bytes()).unwrap();
    until("the request", || counter(at, "mudit_orders") == 1.0);
    drop(stream);
    until("the request's end", || counter(at, "mudit_orders") == 0.0);
    let text = get(at, "/metrics").text();
    assert!(text.contains("mudit_orders_failed_total{reason=\"cancelled\"} 2"), "{text}");
    assert_eq!(counter(at, "mudit_queue_image_steps"), 0.0);
    // A job goes on.
    post(at, "/v1/images/jobs", &json!({"class_label": 0, "steps": 20})).expect(202);
    until("the job", || counter(at, "mudit_orders_finished_total") == 1.0);
}

#[test]
fn slow_and_many_clients_do_not_hold_the_server() {
    let mut short = options();
    short.limits.read_time = Duration::from_millis(600);
    short.limits.write_time = Duration::from_millis(500);
    short.limits.connections = 24;
    let server = Running::start(short);
    let at = server.address();
    // Heads that never end, and bodies that never come.
    let mut slow: Vec<_> = (0..10).map(|_| connect(at)).collect();
    for (i, stream) in slow.iter_mut().enumerate() {
        let text = if i % 2 == 0 {
            "GET / HTTP/1.1\r\nhost: x\r\nx-a: ".to_owned()
        } else {
            head("POST", IMAGES, JSON, 500)
        };
        stream.write_all(text.as_bytes()).unwrap();
    }
    // A client that asks for much and reads nothing.
    let mut deaf = connect(at);
    let body =
        json!({"class_label": 0, "steps": 40, "n": 10, "stream": true, "partial_images": 39}).to_string();
    deaf.write_all((head("POST", IMAGES, JSON, body.len()) + &body).as_bytes()).unwrap();
    until("the deaf client's images", || counter(at, "mudit_images_total") == 10.0);
    post(at, IMAGES, &json!({"class_label": 0, "steps": 2})).expect(200);
    for (i, mut stream) in slow.into_iter().enumerate() {
        let mut answer = Vec::new();
        // The server ends each of them.
        let _ = stream.read_to_end(&mut answer);
        if i % 2 == 1 {
            assert!(String::from_utf8_lossy(&answer).starts_with("HTTP/1.1 408"), "{i}");
        }
    }
    // A client that asks on and on and reads nothing is cut off.
    let mut deaf = connect(at);
    let asked = "GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n".repeat(3000);
    let _ = deaf.write_all(asked.as_bytes());
    // It is when no more answers are made.
    let (mut made, mut since) = (String::new(), Instant::now());
    until("the end of the answers", || {
        let text = get(at, "/metrics").text();
        let line = text.lines().find(|l| l.starts_with("mudit_requests_total{route=\"/openapi.json\""));
        if line.is_some_and(|line| line != made) {
            (made, since) = (line.unwrap_or_default().to_owned(), Instant::now());
        }
        !made.is_empty() && since.elapsed() > Duration::from_secs(2)
    });
    let mut answers = Vec::new();
    let _ = deaf.read_to_end(&mut answers);
    let whole = 3000 * get(at, "/openapi.json").body.len();
    assert!(
        answers.len() < whole,
        "{} of {whole} bytes were sent to a client that did not read",
        answers.len()
    );
    // More connections than places: the later ones wait, none is lost.
    let codes = thread::scope(|scope| {
        let ask = || post(at, IMAGES, &json!({"class_label": 1, "steps": 3})).status;
        let all: Vec<_> = (0..60).map(|_| scope.spawn(ask)).collect();
        all.into_iter().map(|h| h.join().unwrap()).collect::<Vec<u16>>()
    });
    assert_eq!(codes, vec![200; 60]);
}

#[test]
fn a_short_request_does_not_wait_for_a_long_one() {
    let server = Running::start(options());
    let at = server.address();
    // It takes every row of every batch for a long time.
    let long = json!({"class_label": 0, "steps": 1000, "n": 10, "guidance_scale": 3, "stream": true});
    let mut events = Events::open(at, &long);
    events.next();
    post(at, IMAGES, &json!({"class_label": 1, "steps": 10})).expect(200);
    let progress = events.next().unwrap()["step"].as_u64().unwrap();
    assert!(progress < 900, "the long request was at step {progress} by then");
    drop(events);
}

#[test]
fn only_callers_with_a_key_are_served() {
    let mut locked = options();
    locked.keys = Keys::parse("first-key-0123456789\nsecond-key-0123456789").unwrap();
    let server = Running::start(locked);
    let at = server.address();
    let body = json!({"class_label": 0, "steps": 2}).to_string();
    let with = |key: &str, method: &str, path: &str, body: &str| {
        send(at, method, path, &format!("{JSON}authorization: Bearer {key}\r\n"), body.as_bytes())
    };
    let refused = post(at, IMAGES, &json!({"class_label": 0}));
    assert_eq!(refused.header("www-authenticate"), Some("Bearer"));
    refused.refuses(401, "an API key is needed");
    with("first-key-012345678", "POST", IMAGES, &body).refuses(401, "not valid");
    get(at, "/v1/models").refuses(401, "key");
    assert!(post(at, "/v2/models/tiny/infer", &json!({})).expect(401)["error"].is_string());
    with("first-key-0123456789", "POST", IMAGES, &body).expect(200);
    // Probes and the page are open; another caller's job is not seen.
    for path in ["/health", "/v2/health/ready", "/metrics", "/", "/info"] {
        assert_eq!(get(at, path).status, 200, "{path}");
    }
    let job = with("first-key-0123456789", "POST", "/v1/images/jobs", &body).expect(202);
    let place = format!("/v1/images/jobs/{}", job["id"].as_str().unwrap());
    with("second-key-0123456789", "GET", &place, "").refuses(404, "there is no job");
    with("second-key-0123456789", "DELETE", &place, "").refuses(404, "there is no job");
    with("first-key-0123456789", "GET", &place, "").expect(200);
}

#[test]
fn bodies_are_limited_and_must_be_json() {
    let mut small = options();
    small.limits.body = 10_000;
    let server = Running::start(small);
    let at = server.address();
    let large = format!("{{\"class_label\": 0, \"user\": \"{}\"}}", "x".repeat(20_000));
    send(at, "POST", IMAGES, JSON, large.as_bytes()).refuses(413, "more than 10000 bytes");
    let chunked = format!(
        "POST {IMAGES} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{JSON}transfer-encoding: chunked\r\n\r\n{:x}\r\n{large}\r\n0\r\n\r\n",
        large.len()
    );
    raw(at, chunked.as_bytes()).unwrap().refuses(413, "more than 10000 bytes");
    send(at, "POST", IMAGES, "content-type: text/plain\r\n", b"{}").refuses(415, "application/json");
    send(at, "POST", IMAGES, "", b"{}").refuses(400, "give a class");
    send(at, "POST", IMAGES, JSON, b"").refuses(400, "empty");
    send(at, "POST", IMAGES, JSON, b"{\"class_label\": \"\xff\xfe\"}").refuses(400, "no valid request");
}
