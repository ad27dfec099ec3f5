//! The Open Inference Protocol.

use serde_json::{Value, json};

use super::client::{IMAGES, get, pictures, post, send};
use super::{Running, options};

const INFER: &str = "/v2/models/tiny/infer";

#[test]
fn health_and_metadata_are_told() {
    let server = Running::start(options());
    let at = server.address();
    assert_eq!(get(at, "/v2").expect(200)["name"], "mudit");
    assert_eq!(get(at, "/v2/health/live").expect(200)["live"], true);
    assert_eq!(get(at, "/v2/health/ready").expect(200)["ready"], true);
    for model in ["/v2/models/latents", "/v2/models/latents/versions/1"] {
        let metadata = get(at, model).expect(200);
        assert_eq!(metadata["inputs"][2]["shape"], json!([-1, 4, 8, 8]));
        assert_eq!(get(at, &format!("{model}/ready")).expect(200)["ready"], true);
    }
    for missing in ["/v2/models/none", "/v2/models/none/ready", "/v2/models/tiny/versions/2"] {
        assert!(get(at, missing).expect(404)["error"].is_string());
    }
}

#[test]
fn tensors_go_in_and_come_out_in_json_and_in_bytes() {
    let server = Running::start(options());
    let at = server.address();
    let labels = json!({"name": "class_label", "datatype": "INT64", "shape": [2], "data": [1, 2]});
    let seeds = json!({"name": "seed", "datatype": "UINT64", "shape": [2], "data": [5, 9]});
    let settings = json!({"steps": 3, "guidance_scale": 2.0});
    let body = json!({"id": "a", "inputs": [labels, seeds], "parameters": settings});
    let answer = post(at, INFER, &body).expect(200);
    assert_eq!((&answer["id"], &answer["model_name"]), (&json!("a"), &json!("tiny")));
    let output = |answer: &Value, name: &str| -> Value {
        answer["outputs"].as_array().unwrap().iter().find(|o| o["name"] == name).unwrap().clone()
    };
    assert_eq!(output(&answer, "image")["shape"], json!([2, 4, 4, 1]));
    let bytes: Vec<u8> = serde_json::from_value(output(&answer, "image")["data"].clone()).unwrap();
    // The second image is the one that the other interface gives.
    let direct = json!({"class_label": 2, "seed": 9, "steps": 3, "guidance_scale": 2});
    let direct = pictures(&post(at, IMAGES, &direct).expect(200));
    assert_eq!(image::load_from_memory(&direct[0]).unwrap().into_luma8().into_raw(), bytes[16..]);

    // The same with bytes in both directions.
    let head = json!({
        "inputs": [
            {"name": "class_label", "datatype": "INT64", "shape": [2], "parameters": {"binary_data_size": 16}},
            {"name": "seed", "datatype": "UINT64", "shape": [2], "parameters": {"binary_data_size": 16}},
        ],
        "outputs": [{"name": "latent", "parameters": {"binary_data": true}}, {"name": "seed"}],
        "parameters": settings,
    })
    .to_string();
    let mut sent = head.clone().into_bytes();
    sent.extend([1_i64, 2].iter().flat_map(|x| x.to_le_bytes()));
    sent.extend([5_u64, 9].iter().flat_map(|x| x.to_le_bytes()));
    let headers = format!(
        "content-type: application/octet-stream\r\ninference-header-content-length: {}\r\n",
        head.len()
    );
    let reply = send(at, "POST", INFER, &headers, &sent);
    assert_eq!(reply.status, 200, "{}", reply.text());
    let length: usize = reply.header("inference-header-content-length").unwrap().parse().unwrap();
    let json: Value = serde_json::from_slice(&reply.body[..length]).unwrap();
    assert_eq!(
        (&output(&json, "seed")["data"], json["outputs"].as_array().unwrap().len()),
        (&json!([5, 9]), 2)
    );
    let latent: Vec<f32> =
        reply.body[length..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let plain: Vec<f32> = serde_json::from_value(output(&answer, "latent")["data"].clone()).unwrap();
    assert_eq!(latent, plain);

    // A given starting point is used instead of the seed's.
    let noise = json!({"name": "noise", "datatype": "FP32", "shape": [2, 1, 4, 4], "data": vec![0.25; 32]});
    let same = json!({"name": "class_label", "datatype": "INT64", "shape": [2], "data": [1, 1]});
    let body = json!({"inputs": [same, noise], "parameters": settings});
    let answer = post(at, INFER, &body).expect(200);
    let latent: Vec<f32> = serde_json::from_value(output(&answer, "latent")["data"].clone()).unwrap();
    assert_eq!(latent[..16], latent[16..]);
}

#[test]
fn wrong_tensors_are_refused() {
    let server = Running::start(options());
    let label = json!({"name": "class_label", "datatype": "INT64", "shape": [1], "data": [1]});
    let with = |more: Value| json!({"inputs": [label, more]});
    for (body, word) in [
        (json!({}), "inputs"),
        (json!({"inputs": []}), "class_label"),
        (with(label.clone()), "there twice"),
        (with(json!({"name": "x", "datatype": "FP32", "shape": [1], "data": [1]})), "no such input"),
        (with(json!({"name": "seed", "datatype": "INT64", "shape": [1], "data": [1]})), "expected UINT64"),
        (
            with(json!({"name": "noise", "datatype": "FP32", "shape": [1], "data": [1]})),
            "expected FP32 of shape [1, 1, 4, 4]",
        ),
        (json!({"inputs": [label], "parameters": {"n": 3}}), "no such parameter"),
        (json!({"inputs": [label], "parameters": {"steps": 0}}), "steps"),
        (json!({"inputs": [label], "outputs": [{"name": "x"}]}), "image or latent or seed"),
        (json!({"inputs": [label], "outputs": 3}), "outputs"),
        (json!({"inputs": [label], "model": "tiny"}), "no such field"),
        (
            json!({"inputs": [{"name": "class_label", "datatype": "INT64", "shape": [1], "data": [7]}]}),
            "is no class",
        ),
        (
            json!({"inputs": [{"name": "class_label", "datatype": "INT64", "shape": [11], "data": vec![0; 11]}]}),
            "at most 10",
        ),
    ] {
        let error = post(server.address(), INFER, &body).expect(400)["error"].to_string();
        assert!(error.contains(word), "{body}: {error}");
    }
    let headers = "content-type: application/octet-stream\r\ninference-header-content-length: 99999\r\n";
    assert!(send(server.address(), "POST", INFER, headers, b"{}").expect(400)["error"].is_string());
    post(server.address(), "/v2/models/none/infer", &json!({"inputs": [label]})).expect(404);
    // Triton's own client names no type; a browser's page of another origin may not leave it out.
    let body = json!({"inputs": [label], "parameters": {"steps": 1}}).to_string();
    assert_eq!(send(server.address(), "POST", INFER, "", body.as_bytes()).status, 200);
    let foreign = "origin: http://elsewhere.example\r\n";
    let refused = send(server.address(), "POST", INFER, foreign, body.as_bytes()).expect(415);
    assert!(refused["error"].as_str().unwrap().contains("application/json"), "{refused}");
}
