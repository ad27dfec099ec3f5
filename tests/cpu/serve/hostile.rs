//! A thousand requests that are no requests: each is refused, and the server goes on.

use std::time::Duration;

use mudit_tests::draws::Draws;
use serde_json::json;

use super::client::{IMAGES, head, post, raw};
use super::{Running, options};

const JSON: &str = "content-type: application/json\r\n";
const GOOD: &str = r#"{"model": "tiny", "class_label": 1, "n": 1, "size": "4x4", "steps": 3, "guidance_scale": 2, "seed": 5, "stream": false}"#;

/// Bodies and heads of one kind each.
fn hostile(kind: usize, draws: &mut Draws) -> Vec<u8> {
    let post = |body: &[u8]| {
        let mut bytes = head("POST", IMAGES, JSON, body.len()).into_bytes();
        bytes.extend(body);
        bytes
    };
    match kind {
        // A good body with some bytes changed, so that it is broken or asks for something else that is wrong.
        0 => {
            let mut body = GOOD.as_bytes().to_vec();
            for _ in 0..=draws.below(6) {
                let at = draws.below(body.len());
                body[at] = draws.below(256) as u8;
            }
            // Whatever it became, this field is none.
            let end = body.len() - 1;
            body.splice(end.., *b", \"\xc3\xa4\": 1}");
            post(&body)
        }
        // Cut off.
        1 => post(&GOOD.as_bytes()[..draws.below(GOOD.len())]),
        // Wrong types.
        2 => {
            let fields = [
                "n",
                "steps",
                "seed",
                "class_label",
                "guidance_scale",
                "size",
                "sampler",
                "stream",
                "model",
                "prompt",
            ];
            let values = ["{}", "[[]]", "{\"a\": 1}", "-1e400", "1e999", "[{}]"];
            let (field, value) = (fields[draws.below(fields.len())], values[draws.below(values.len())]);
            post(format!("{{\"class_label\": 0, \"{field}\": {value}}}").as_bytes())
        }
        // Missing, unknown and doubled keys.
        3 => post(
            [
                &b"{}"[..],
                b"{\"steps\": 3}",
                b"{\"class_label\": 0, \"class_label\": 0}",
                b"{\"\": 0}",
                b"null",
                b"3",
            ][draws.below(6)],
        ),
        // Random bytes with a JSON head.
        4 => post(&(0..draws.below(400)).map(|_| draws.below(256) as u8).collect::<Vec<_>>()),
        // Deep and long.
        5 => {
            let n = 1 + draws.below(50_000);
            post(
                [
                    ["[".repeat(n), "{\"a\":".repeat(n)][draws.below(2)].clone(),
                    format!("{{\"class_label\": {}}}", "9".repeat(n + 2)),
                ][draws.below(2)]
                .as_bytes(),
            )
        }
        // A body over the limit: announced, and sent.
        6 => {
            let announced = head("POST", IMAGES, JSON, 1 << 40).into_bytes();
            let sent = post(format!("{{\"user\": \"{}\"}}", "x".repeat(70_000)).as_bytes());
            if draws.below(2) == 0 { announced } else { sent }
        }
        // Paths.
        7 => {
            let paths = [
                "/../../etc/passwd",
                "/v1/images/jobs/..%2f..%2fetc",
                "//",
                "/%00",
                "/v1/models/%ff",
                "/..;/",
                "/v2/models/../infer",
                "/v1/images/jobs/",
                "/.git/config",
                "/v2/models/%2e%2e/ready",
            ];
            head("GET", paths[draws.below(paths.len())], "", 0).into_bytes()
        }
        // Heads.
        8 => {
            let lines = [
                "content-type: application/json\r\ncontent-length: 5\r\n",
                "transfer-encoding: chunked\r\n",
                "inference-header-content-length: -1\r\ncontent-type: application/octet-stream\r\n",
                "content-type: text/html\r\n",
                "authorization: Bearer \u{7f}\r\n",
                "content-type\r\n",
            ];
            let line = lines[draws.below(lines.len())];
            let mut bytes = head("POST", IMAGES, line, 2).into_bytes();
            bytes.extend(b"{}");
            bytes
        }
        // No HTTP.
        9 => {
            let kinds: [&[u8]; 5] = [
                b"\x16\x03\x01\x02\x00\x01\x00",
                b"GET\r\n\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"GET / HTTP/9.9\r\n\r\n",
                b"\0\0\0\0\r\n\r\n",
            ];
            kinds[draws.below(kinds.len())].to_vec()
        }
        // Tensors.
        10 => {
            let size = draws.bits();
            let body = format!(
                "{{\"inputs\": [{{\"name\": \"class_label\", \"datatype\": \"INT64\", \"shape\": [{size}], \"parameters\": {{\"binary_data_size\": {}}}}}]}}",
                draws.below(99)
            );
            let mut bytes = head("POST", "/v2/models/tiny/infer", JSON, body.len()).into_bytes();
            bytes.extend(body.as_bytes());
            bytes
        }
        // Methods, and a head that is too long.
        _ => match draws.below(3) {
            0 => head("BREW", IMAGES, "", 0).into_bytes(),
            1 => head("DELETE", "/", "", 0).into_bytes(),
            _ => head("GET", "/", &format!("x: {}\r\n", "y".repeat(100_000)), 0).into_bytes(),
        },
    }
}

#[test]
fn a_thousand_hostile_requests_are_refused_and_a_good_one_is_served() {
    let mut short = options();
    short.limits.body = 60_000;
    short.limits.read_time = Duration::from_millis(300);
    let server = Running::start(short);
    let good =
        || post(server.address(), IMAGES, &serde_json::from_str(GOOD).unwrap()).expect(200)["data"].clone();
    let before = good();
    let mut draws = Draws::named("hostile");
    let mut unanswered = 0;
    for i in 0..1000 {
        let kind = i % 12;
        let bytes = hostile(kind, &mut draws);
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(300)]).into_owned();
        if let Some(reply) = raw(server.address(), &bytes) {
            assert!((400..500).contains(&reply.status), "{} for {text}: {}", reply.status, reply.text());
        } else {
            // The connection ends without a word where what came is no HTTP.
            unanswered += 1;
            assert!([6, 8, 9, 11].contains(&kind), "no answer to {text:?}");
        }
    }
    assert!(unanswered < 100, "{unanswered} were not answered");
    assert_eq!(good(), before);
    let text = super::client::get(server.address(), "/metrics").text();
    assert!(!text.contains("code=\"500\""), "{text}");
    post(server.address(), IMAGES, &json!({"class_label": 0, "steps": 2, "stream": true}));
}
