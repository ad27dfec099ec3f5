//! A refusal has the shape that clients of its path expect, whoever refuses and why.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use mudit::serve::Server;
use mudit::serve::http::auth::Keys;
use serde_json::{Value, json};

use super::client::{Events, IMAGES, Reply, connect, get, head, post, raw, send};
use super::{Running, flow, options};

const JSON: &str = "content-type: application/json\r\n";
const INFER: &str = "/v2/models/tiny/infer";

/// The error of an answer, which has its path's shape.
#[track_caller]
fn error(path: &str, reply: &Reply, status: u16) -> String {
    let body = reply.expect(status);
    let error = &body["error"];
    let protocol = path.starts_with("/v2/");
    let text = if protocol { error } else { &error["message"] };
    assert_eq!(error.is_object(), !protocol, "{path}: {body}");
    assert!(error.is_string() || (error["type"].is_string() && error["code"].is_string()), "{path}: {body}");
    text.as_str().unwrap_or_else(|| panic!("{path}: {body}")).to_owned()
}

#[test]
fn every_status_has_the_shape_of_its_path() {
    let mut small = options();
    small.limits.body = 1000;
    small.limits.read_time = Duration::from_millis(300);
    let server = Running::start(small);
    let at = server.address();
    let long = format!("x-long: {}\r\n", "y".repeat(40_000));
    let many = "x-many: 1\r\n".repeat(150);
    let large = "x".repeat(2000);
    for (method, path, headers, body, status, word) in [
        ("GET", "/v2/nothing", "", "", 404, "there is no GET /v2/nothing"),
        ("GET", "/v2/models/tiny/trace/setting", "", "", 404, "there is no GET"),
        ("GET", "/v2x", "", "", 404, "there is no GET /v2x"),
        ("GET", "/v1/nothing", "", "", 404, "there is no GET"),
        ("GET", "/v2/models/none", "", "", 404, "there is no model"),
        ("GET", "/v2/models/none/config", "", "", 404, "there is no model"),
        ("GET", "/v2/models/tiny/versions/7/stats", "", "", 404, "has version 1 only"),
        ("GET", "/v1/models/none", "", "", 404, "there is no model"),
        ("GET", "/v2/models/%ff", "", "", 400, "Bad Request"),
        ("GET", "/v1/models/%ff", "", "", 400, "Bad Request"),
        ("GET", INFER, "", "", 405, "does not take GET"),
        ("DELETE", "/v2/health/live", "", "", 405, "does not take DELETE"),
        ("GET", IMAGES, "", "", 405, "does not take GET"),
        ("POST", INFER, JSON, "{", 400, "no valid request"),
        ("POST", IMAGES, JSON, "{", 400, "no valid request"),
        ("POST", INFER, JSON, &large, 413, "more than 1000 bytes"),
        ("POST", IMAGES, JSON, &large, 413, "more than 1000 bytes"),
        ("POST", INFER, "content-type: text/html\r\n", "{}", 415, "application/json"),
        ("POST", IMAGES, "content-type: text/html\r\n", "{}", 415, "application/json"),
        ("POST", "/v2/repository/models/tiny/load", JSON, "{}", 400, "chosen when it starts"),
        ("POST", "/v2/systemsharedmemory/region/a/register", JSON, "{}", 400, "shared memory"),
        ("GET", "/v2/cudasharedmemory/region/a/status", "", "", 404, "no region `a`"),
        ("GET", "/v2/models/tiny", &long, "", 431, "more than 32768 bytes"),
        ("GET", "/v1/models", &long, "", 431, "more than 32768 bytes"),
        ("GET", "/v2/models/tiny", &many, "", 431, "more than 100 fields"),
    ] {
        let reply = send(at, method, path, headers, body.as_bytes());
        let text = error(path, &reply, status);
        assert!(text.contains(word), "{method} {path}: {text}");
        assert!(reply.header("x-request-id").is_some(), "{method} {path}");
    }
    for path in [INFER, IMAGES] {
        // The body does not come.
        let late = raw(at, head("POST", path, JSON, 500).as_bytes()).unwrap();
        assert!(error(path, &late, 408).contains("did not come"));
    }
    assert_eq!(get(at, "/v2/models/tiny/ready").expect(200)["ready"], true);
}

#[test]
fn keys_full_queues_and_loading_are_told_in_the_shape_of_the_path() {
    let server = Server::bind(vec![flow()], options()).unwrap();
    let tensors = json!({"inputs": [
        {"name": "class_label", "datatype": "INT64", "shape": [10], "data": vec![1; 10]},
    ], "parameters": {"steps": 1000}});
    let loading = post(server.address(), INFER, &tensors);
    assert!(error(INFER, &loading, 503).contains("loading"));
    assert_eq!(loading.header("retry-after"), Some("1"));
    for path in ["/v2/health/ready", "/v2/models/tiny/ready"] {
        assert!(error(path, &get(server.address(), path), 503).contains("loading"));
    }
    server.drain();

    let mut locked = options();
    locked.keys = Keys::parse("first-key-0123456789").unwrap();
    let server = Running::start(locked);
    for path in [INFER, IMAGES] {
        let reply = post(server.address(), path, &tensors);
        assert!(error(path, &reply, 401).contains("an API key is needed"));
        assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
    }
    drop(server);

    let mut narrow = options();
    narrow.engine.max_queue = Some(100);
    let server = Running::start(narrow);
    let long = json!({"class_label": 0, "steps": 1000, "n": 10, "stream": true});
    let mut events = Events::open(server.address(), &long);
    events.next();
    for (path, body) in [(INFER, &tensors), (IMAGES, &json!({"class_label": 0, "n": 10, "steps": 1000}))] {
        let reply = post(server.address(), path, body);
        assert!(error(path, &reply, 429).contains("image-steps wait"));
        let seconds: f64 = reply.header("retry-after").unwrap().parse().unwrap();
        let finer: f64 = reply.header("retry-after-ms").unwrap().parse().unwrap();
        assert!(finer >= 250.0 && (1.0..=4.0).contains(&(seconds * 1e3 / finer)), "{seconds} s, {finer} ms");
    }
}

#[test]
fn tritons_questions_are_answered() {
    let server = Running::start(options());
    let at = server.address();
    let tensors = json!({"inputs": [
        {"name": "class_label", "datatype": "INT64", "shape": [2], "data": [1, 2]},
    ], "parameters": {"steps": 3, "guidance_scale": 1}});
    post(at, INFER, &tensors).expect(200);
    for model in ["/v2/models/tiny", "/v2/models/tiny/versions/1"] {
        let (metadata, config) =
            (get(at, model).expect(200), get(at, &format!("{model}/config")).expect(200));
        assert_eq!((&config["name"], &config["max_batch_size"]), (&json!("tiny"), &json!(0)));
        for (of, side) in [("inputs", "input"), ("outputs", "output")] {
            for (a, b) in metadata[of].as_array().unwrap().iter().zip(config[side].as_array().unwrap()) {
                let kind = format!("TYPE_{}", a["datatype"].as_str().unwrap());
                assert_eq!(
                    (&a["name"], &a["shape"], &json!(kind)),
                    (&b["name"], &b["dims"], &b["data_type"])
                );
            }
        }
        let stats = get(at, &format!("{model}/stats")).expect(200)["model_stats"][0].clone();
        let of = &stats["inference_stats"];
        assert_eq!((&stats["inference_count"], &of["success"]["count"]), (&json!(2), &json!(1)), "{stats}");
        assert!(of["success"]["ns"].as_u64() >= of["compute_infer"]["ns"].as_u64(), "{stats}");
        assert!(
            stats["execution_count"].as_u64().unwrap() >= 3 && stats["last_inference"].as_u64() > Some(0)
        );
    }
    let all = get(at, "/v2/models/stats").expect(200);
    assert_eq!(all["model_stats"][1]["inference_count"], 0, "{all}");
    let index = post(at, "/v2/repository/index", &json!({})).expect(200);
    assert_eq!(index[1], json!({"name": "latents", "version": "1", "state": "READY", "reason": ""}));
    for kind in ["systemsharedmemory", "cudasharedmemory"] {
        assert_eq!(get(at, &format!("/v2/{kind}/status")).expect(200), json!([]));
        post(at, &format!("/v2/{kind}/unregister"), &json!({})).expect(200);
    }
}

#[test]
fn a_head_that_is_too_long_to_be_read_ends_the_connection_alone() {
    let server = Running::start(options());
    let mut stream = connect(server.address());
    let _ = stream.write_all(head("GET", "/", &format!("x: {}\r\n", "y".repeat(400_000)), 0).as_bytes());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"), "{}", String::from_utf8_lossy(&answer));
    let body: Value = get(server.address(), "/health").expect(200);
    assert_eq!(body["status"], "ok");
}
