//! Bodies as real clients send them: packed, without a type, with numbers that are doubles, with options that other
//! servers have.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use serde_json::{Value, json};

use super::client::{IMAGES, get, pictures, post, send};
use super::{Running, named, options};

const JSON: &str = "content-type: application/json\r\n";
const INFER: &str = "/v2/models/tiny/infer";

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn packed_bodies_are_taken_within_the_limit_or_refused_by_name() {
    let mut small = options();
    small.limits.body = 100_000;
    let server = Running::start(small);
    let at = server.address();
    let body = json!({"class_label": 1, "steps": 2, "seed": 3}).to_string();
    let plain = pictures(&send(at, "POST", IMAGES, JSON, body.as_bytes()).expect(200));
    let tensors = json!({"inputs": [{"name": "class_label", "datatype": "INT64", "shape": [1], "data": [1]}],
        "parameters": {"steps": 2}})
    .to_string();
    let halves = [gzip(&body.as_bytes()[..10]), gzip(&body.as_bytes()[10..])].concat();
    let sent = |path: &str, encoding: &str, bytes: &[u8]| {
        send(at, "POST", path, &format!("{JSON}content-encoding: {encoding}\r\n"), bytes)
    };
    for (encoding, bytes) in [
        ("gzip", gzip(body.as_bytes())),
        ("GZip", gzip(body.as_bytes())),
        ("x-gzip", gzip(body.as_bytes())),
        ("gzip", halves),
        ("deflate", deflate(body.as_bytes())),
        ("identity", body.clone().into_bytes()),
        ("identity, gzip", gzip(body.as_bytes())),
        ("", body.clone().into_bytes()),
    ] {
        assert!(pictures(&sent(IMAGES, encoding, &bytes).expect(200)) == plain, "{encoding}");
    }
    assert_eq!(sent(INFER, "gzip", &gzip(tensors.as_bytes())).status, 200);
    for encoding in ["br", "zstd", "gzip, gzip", "gzip, br", "compress", "aws-chunked"] {
        let reply = sent(IMAGES, encoding, b"x");
        assert_eq!(reply.header("accept-encoding"), Some("gzip, deflate, identity"), "{encoding}");
        reply.refuses(415, &encoding[..2]);
        let refused = sent(INFER, encoding, b"x");
        assert!(refused.expect(415)["error"].is_string() && refused.header("accept-encoding").is_some());
    }
    // Small on the way, large in memory.
    let bomb = format!("{{\"user\": \"{}\"}}", "x".repeat(50_000_000));
    sent(IMAGES, "gzip", &gzip(bomb.as_bytes())).refuses(413, "more than 100000 bytes");
    let packed = gzip(body.as_bytes());
    for bytes in [&packed[..packed.len() - 6], &packed[1..], body.as_bytes(), b""] {
        sent(IMAGES, "gzip", bytes).refuses(400, "Content-Encoding");
    }
    sent(IMAGES, "deflate", &packed).refuses(400, "Content-Encoding");
}

#[test]
fn a_type_may_be_left_out_by_all_but_browsers() {
    let server = Running::start(options());
    let at = server.address();
    let form = "content-type: application/x-www-form-urlencoded\r\n";
    let images = json!({"class_label": 1, "steps": 1}).to_string();
    let tensors = json!({"inputs": [{"name": "class_label", "datatype": "INT64", "shape": [1], "data": [1]}],
        "parameters": {"steps": 1}})
    .to_string();
    for (path, body) in [(IMAGES, &images), (INFER, &tensors), ("/v1/images/jobs", &images)] {
        for headers in ["", form, JSON] {
            let reply = send(at, "POST", path, headers, body.as_bytes());
            assert!(reply.status == 200 || reply.status == 202, "{path} {headers}: {}", reply.text());
        }
        for browser in
            ["origin: http://elsewhere.example\r\n", "sec-fetch-site: cross-site\r\n", "origin: null\r\n"]
        {
            for headers in ["", form, "content-type: text/plain\r\n"] {
                let reply = send(at, "POST", path, &format!("{browser}{headers}"), body.as_bytes());
                assert_eq!(reply.status, 415, "{path} {browser} {headers}");
            }
        }
        assert_eq!(send(at, "POST", path, "content-type: text/plain\r\n", body.as_bytes()).status, 415);
    }
}

#[test]
fn whole_numbers_may_be_written_as_doubles() {
    let server = Running::start(options());
    let at = server.address();
    let plain = json!({"class_label": 1, "steps": 3, "n": 2, "seed": 42});
    let same = pictures(&post(at, IMAGES, &plain).expect(200));
    for (field, text) in [
        ("steps", "3.0"),
        ("steps", "3e0"),
        ("n", "2.0"),
        ("seed", "42.0"),
        ("seed", "4.2e1"),
        ("class_label", "1.0"),
        ("class_label", "[1.0, 1.0]"),
        ("timeout_ms", "60000.0"),
        ("partial_images", "0.0"),
        ("output_compression", "100.0"),
    ] {
        let mut body = plain.clone();
        body[field] = serde_json::from_str(text).unwrap();
        assert!(pictures(&post(at, IMAGES, &body).expect(200)) == same, "{field} {text}");
    }
    for (field, text) in
        [("steps", "2.5"), ("n", "1e10"), ("seed", "9007199254740993.0"), ("class_label", "-1.0")]
    {
        let mut body = plain.clone();
        body[field] = serde_json::from_str(text).unwrap();
        assert_eq!(post(at, IMAGES, &body).refuses(400, field).as_deref(), Some(field), "{text}");
    }
    let tensors = |shape: f64, label: f64, seed: f64| {
        json!({"inputs": [
            {"name": "class_label", "datatype": "INT64", "shape": [shape], "data": [label]},
            {"name": "seed", "datatype": "UINT64", "shape": [1], "data": [seed]},
        ], "parameters": {"steps": 2.0}})
    };
    let answer = post(at, INFER, &tensors(1.0, 1.0, 7.0)).expect(200);
    assert_eq!(answer["outputs"][2]["data"], json!([7]));
    post(at, INFER, &tensors(1.0, 1.5, 7.0)).expect(400);
}

#[test]
fn options_that_cannot_matter_are_ignored_where_that_was_asked_for() {
    let body = |field: &str, value: &Value| {
        let mut body = json!({"class_label": 1, "steps": 2, "seed": 1});
        body[field] = value.clone();
        body
    };
    let ignored = [
        ("style", json!("vivid")),
        ("style", json!("natural")),
        ("quality", json!("hd")),
        ("quality", json!("high")),
        ("moderation", json!("low")),
        ("output_compression", json!(80)),
    ];
    let strict = Running::start(options());
    let same = pictures(&post(strict.address(), IMAGES, &body("background", &json!("opaque"))).expect(200));
    for (field, value) in &ignored {
        let named =
            post(strict.address(), IMAGES, &body(field, value)).refuses(400, "--ignore-unused-options");
        assert_eq!(named.as_deref(), Some(*field));
    }
    let mut lenient = options();
    lenient.limits.ignore_unused = true;
    let lenient = Running::start(lenient);
    for (field, value) in &ignored {
        assert!(
            pictures(&post(lenient.address(), IMAGES, &body(field, value)).expect(200)) == same,
            "{field}"
        );
    }
    // What would be another picture, or is no value of that kind, is refused all the same.
    for (field, value) in [
        ("background", json!("transparent")),
        ("size", json!("1024x1024")),
        ("output_format", json!("webp")),
        ("response_format", json!("url")),
        ("negative_prompt", json!("x")),
        ("style", json!(3)),
        ("output_compression", json!(101)),
    ] {
        let named = post(lenient.address(), IMAGES, &body(field, &value)).refuses(400, field);
        assert_eq!(named.as_deref(), Some(field));
    }
    let document = get(lenient.address(), "/openapi.json").expect(200);
    let fields = &document["components"]["schemas"]["ImageRequest"]["properties"];
    assert!(fields["style"]["enum"].is_null(), "{fields}");
}

#[test]
fn names_are_found_in_any_form_and_numbers_that_mean_two_are_refused() {
    let server = Running::of(vec![named(["e\u{301}te\u{301}", "Вой", "0"])], options());
    let at = server.address();
    for (text, label) in [
        ("\u{e9}t\u{e9}", 0),
        ("E\u{301}TE\u{301}", 0),
        ("ВОИ\u{306}", 1),
        ("вой", 1),
        ("@0", 0),
        ("@2", 2),
        ("1", 1),
    ] {
        for field in ["prompt", "class_label"] {
            let body = json!({field: text, "steps": 1});
            let answer = post(at, IMAGES, &body).expect(200);
            assert_eq!(answer["data"][0]["class_label"], label, "{field} {text}");
        }
    }
    for field in ["prompt", "class_label"] {
        // It is the name of class 2, and the number of another.
        let body = json!({field: "0", "steps": 1});
        assert_eq!(post(at, IMAGES, &body).refuses(400, "`@0`").as_deref(), Some(field));
        post(at, IMAGES, &body).refuses(400, "`@2`");
    }
    // A number in JSON is the number of a class, as it is in tensors.
    assert_eq!(
        post(at, IMAGES, &json!({"class_label": 0, "steps": 1})).expect(200)["data"][0]["class_label"],
        0
    );
}
