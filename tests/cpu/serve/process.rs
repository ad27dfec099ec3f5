//! The command itself: what it says, how it ends.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use serde_json::json;

use super::client::{IMAGES, counter, get, post};
use crate::process::Running;
use crate::scene::Scene;

const SERVE: &str =
    "serve --offline --checkpoint checkpoint --port 0 --max-rows 8 --max-queue 1000000 --json";

/// Starts the command and waits until it is ready.
fn start(scene: &Scene, more: &str) -> (Running, SocketAddr) {
    let running = scene.mudit(&format!("{SERVE} {more}")).start();
    let mut address = None;
    let ready = running.until(Duration::from_millis(10), || {
        address = serde_json::from_str::<serde_json::Value>(&running.said()).ok();
        address.is_some()
    });
    assert!(ready, "{}", running.wait());
    let url = address.unwrap()["url"].as_str().unwrap().to_owned();
    (running, url.strip_prefix("http://").unwrap().parse().unwrap())
}

#[test]
fn sigterm_under_load_finishes_what_was_accepted() {
    let scene = Scene::new();
    let (running, at) = start(&scene, "--drain-timeout 120");
    let body = json!({"class_label": 3, "steps": 120, "n": 3, "sampler": "ddim"});
    let (codes, late) = thread::scope(|scope| {
        let all: Vec<_> = (0..12).map(|_| scope.spawn(|| post(at, IMAGES, &body).status)).collect();
        super::client::until("the requests", || counter(at, "mudit_orders") >= 12.0);
        running.signal(libc::SIGTERM);
        super::client::until("readiness to go", || get(at, "/v2/health/ready").status == 503);
        let late = post(at, IMAGES, &body).status;
        (all.into_iter().map(|h| h.join().unwrap()).collect::<Vec<u16>>(), late)
    });
    assert_eq!((codes, late), (vec![200; 12], 503));
    let done = running.wait();
    assert_eq!((done.code, done.signal), (Some(0), None), "{done}");
}

#[test]
fn what_cannot_be_finished_in_time_is_an_error() {
    let scene = Scene::new();
    let (running, at) = start(&scene, "--drain-timeout 0.05");
    let body = json!({"class_label": 3, "steps": 1000, "n": 10, "sampler": "ddim"});
    thread::scope(|scope| {
        let waiting = scope.spawn(|| post(at, IMAGES, &body));
        super::client::until("the request", || counter(at, "mudit_orders") >= 1.0);
        running.signal(libc::SIGTERM);
        waiting.join().unwrap().refuses(503, "the server stopped");
    });
    running.wait().refuses(1, &["--drain-timeout"]);
}

#[test]
fn other_machines_are_served_only_with_keys() {
    let scene = Scene::new();
    scene.refuses(&format!("{SERVE} --host 0.0.0.0"), 2, &["0.0.0.0", "--api-key-file", "--insecure"]);
    scene.write("keys", "too-short\n");
    scene.refuses(&format!("{SERVE} --api-key-file keys"), 1, &["keys", "16"]);
    scene.refuses(&format!("{SERVE} --model a/b=checkpoint"), 2, &["letters"]);
    scene.refuses(&format!("{SERVE} --model checkpoint=checkpoint"), 2, &["checkpoint", "NAME=DIR"]);
    scene.refuses("serve --offline --port 0", 2, &["--checkpoint"]);
    scene.refuses(&format!("{SERVE} --max-images 0"), 2, &["--max-images"]);
    // Numbers beyond all machines are refused before anything is made of them.
    for name in [
        "--max-images",
        "--max-steps",
        "--max-body",
        "--max-connections",
        "--max-jobs",
        "--max-rows",
        "--max-queue",
    ] {
        let line =
            format!("{} {name} 100000000000000", SERVE.replace(" --max-rows 8 --max-queue 1000000", ""));
        scene.refuses(&line, 2, &[name, "100000000000000"]);
    }
    for name in ["--request-timeout", "--read-timeout", "--keep-alive", "--drain-delay"] {
        scene.refuses(&format!("{SERVE} {name} 1e14"), 2, &[name, "0 to 86400"]);
    }
    for line in [
        "--concurrency 100000000000000",
        "--requests 100000000000000 --concurrency 1",
        "--rate 1e300 --duration 1e4",
        "--rate nan",
        "--duration 1e14 --rate 1",
        "--timeout 1e14",
        "--steps 18446744073709551615",
        "-n 18446744073709551615",
    ] {
        scene.refuses(&format!("bench-serve {line}"), 2, &["--"]);
    }
    for (host, word) in [
        ("no-such-host.invalid", "--host no-such-host.invalid"),
        ("localhost:8000", "without a port"),
        ("[::1", "--host [::1"),
    ] {
        scene.refuses(&format!("serve --offline --checkpoint checkpoint --port 0 --host {host}"), 2, &[word]);
    }
    for origin in ["localhost:3000", "http://a/b", "http://", "http://me@a", "x y"] {
        let command = scene.mudit(&format!("{SERVE} --cors-origin")).with(origin);
        scene.untouched(command, 2, &["--cors-origin", "SCHEME://HOST"]);
    }
    let (running, at) = start(&scene, "--host localhost --cors-origin HTTP://Localhost:80/");
    scene.untouched(
        scene.mudit(&format!("serve --offline --checkpoint checkpoint --port {}", at.port())),
        1,
        &["cannot listen"],
    );
    // The load generator works against it, and reports.
    let line = format!("bench-serve --url http://{at} --requests 6 --steps 2,4 --concurrency 1,3 --json");
    let report: serde_json::Value = serde_json::from_str(&scene.mudit(&line).succeeds()).unwrap();
    for run in report["runs"].as_array().unwrap() {
        assert_eq!((run["done"].as_u64(), run["lost"].as_u64()), (Some(6), Some(0)), "{run}");
        assert!(
            run["slot_use"].as_f64().unwrap() > 0.1 && run["p99_ms"].as_f64() >= run["p50_ms"].as_f64(),
            "{run}"
        );
    }
    let line = format!("bench-serve --url http://{at} --rate 20 --duration 1 --steps 2");
    assert_eq!(scene.mudit(&line).succeeds().lines().count(), 2);
    running.signal(libc::SIGINT);
    assert_eq!(running.wait().code, Some(0));
}
