//! What the server answers.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::client::{Events, IMAGES, decode, get, pictures, post, send, until};
use super::{Running, options};

fn picture(png: &[u8]) -> image::DynamicImage {
    image::load_from_memory(png).unwrap()
}

#[test]
fn images_come_with_their_seeds_and_settings() {
    let server = Running::start(options());
    let at = server.address();
    let body =
        post(at, IMAGES, &json!({"class_label": 1, "steps": 3, "seed": 7, "n": 2, "guidance_scale": 2}));
    let total: u64 = body.header("x-total-time").unwrap().parse().unwrap();
    assert!(total < 60_000 && body.header("x-request-id").is_some());
    let body = body.expect(200);
    let seeds: Vec<_> = body["data"].as_array().unwrap().iter().map(|d| d["seed"].as_u64()).collect();
    assert_eq!(seeds, [Some(7), Some(8)]);
    assert_eq!(
        (&body["sampler"], &body["steps"], &body["model"]),
        (&json!("euler"), &json!(3), &json!("tiny"))
    );
    let all = pictures(&body);
    assert_eq!((picture(&all[0]).width(), picture(&all[0]).color()), (4, image::ColorType::L8));
    assert!(all[0] != all[1]);
    // The second image is that of its own seed.
    let second = post(at, IMAGES, &json!({"prompt": "dash", "num_inference_steps": 3, "seed": 8, "cfg": 2}));
    assert!(pictures(&second.expect(200))[0] == all[1]);
    // A seed that is drawn is told, and gives the same again.
    let drawn = post(at, IMAGES, &json!({"class_label": "ring", "steps": 3})).expect(200);
    let again = json!({"class_label": 2, "steps": 3, "seed": drawn["data"][0]["seed"]});
    assert!(pictures(&post(at, IMAGES, &again).expect(200)) == pictures(&drawn));

    let raw = json!({"class_label": 1, "steps": 3, "seed": 7, "guidance_scale": 2, "response_format": "png"});
    let raw = post(at, IMAGES, &raw);
    assert_eq!(
        (raw.status, raw.header("content-type"), raw.header("x-seed")),
        (200, Some("image/png"), Some("7"))
    );
    assert!(raw.body == all[0]);
    let accept = "content-type: application/json\r\naccept: image/png\r\n";
    let body = json!({"class_label": 1, "steps": 3, "seed": 7, "guidance_scale": 2}).to_string();
    assert!(send(at, "POST", IMAGES, accept, body.as_bytes()).body == all[0]);

    // One class an image; none; the other model with every sampler of its kind.
    let many = post(at, IMAGES, &json!({"class_label": [0, "ring", 0], "steps": 1, "seed": 0})).expect(200);
    let labels: Vec<_> = many["data"].as_array().unwrap().iter().map(|d| d["class_name"].clone()).collect();
    assert_eq!(labels, ["dot", "ring", "dot"]);
    let none = post(at, IMAGES, &json!({"class_label": null, "steps": 2})).expect(200);
    assert_eq!((&none["data"][0]["class_name"], &none["guidance_scale"]), (&json!("none"), &json!(1.0)));
    for sampler in ["ddpm", "ddim", "dpm++2m"] {
        let body =
            json!({"model": "latents", "class_label": 9, "sampler": sampler, "steps": 5, "size": "8x8"});
        let body = post(at, IMAGES, &body).expect(200);
        assert_eq!(picture(&pictures(&body)[0]).color(), image::ColorType::Rgb8);
    }
    let eta =
        json!({"model": "latents", "prompt": "3", "sampler": "ddim", "eta": 0.5, "steps": 4, "user": "me"});
    post(at, IMAGES, &eta).expect(200);
    let heun = json!({"prompt": "ring", "sampler": "heun", "shift": 2, "steps": 4, "quality": "auto"});
    assert_eq!(post(at, IMAGES, &heun).expect(200)["metrics"]["image_steps"], 14);
}

#[test]
fn every_wrong_field_is_named() {
    let server = Running::start(options());
    for (change, field, word) in [
        (json!({"step": 3}), "step", "did you mean `steps`?"),
        (json!({"steps": 0}), "steps", "from 1 to 1000, got 0"),
        (json!({"steps": 5000}), "steps", "from 1 to 1000"),
        (json!({"steps": 2.5}), "steps", "whole number"),
        (json!({"steps": 2, "num_inference_steps": 2}), "num_inference_steps", "the same as `steps`"),
        (json!({"cfg": 2, "guidance_scale": 2}), "cfg", "the same as `guidance_scale`"),
        (json!({"guidance_scale": -1}), "guidance_scale", "from 0 to 100"),
        (json!({"guidance_scale": "3"}), "guidance_scale", "expected a number"),
        (json!({"class_label": 3}), "class_label", "0 to 2, or dot, dash, ring"),
        (json!({"class_label": -1}), "class_label", "is no class"),
        (json!({"class_label": 1.5}), "class_label", "is no class"),
        (json!({"class_label": "@3"}), "class_label", "\"@3\" is no class"),
        (json!({"class_label": "square"}), "class_label", "\"square\" is no class"),
        (json!({"class_label": []}), "class_label", "at least one class"),
        (json!({"class_label": [0, 9]}), "class_label", "9 is no class"),
        (json!({"class_label": [0, 1], "n": 3}), "n", "names 2 images"),
        (
            json!({"class_label": null, "guidance_scale": 2}),
            "guidance_scale",
            "without class cannot be guided",
        ),
        (json!({"prompt": "a cat"}), "prompt", "no class of this model"),
        (json!({"prompt": "ring"}), "prompt", "another one"),
        (json!({"n": 11}), "n", "from 1 to 10"),
        (json!({"n": true}), "n", "whole number"),
        (json!({"size": "512x512"}), "size", "expected 4x4 or auto"),
        (json!({"seed": -1}), "seed", "whole number"),
        (json!({"seed": 1.5}), "seed", "whole number"),
        (json!({"sampler": "ddim"}), "sampler", "expected euler or heun or sde"),
        (json!({"eta": 0.5}), "eta", "only ddim has it"),
        (json!({"shift": 2, "sampler": "sde"}), "shift", "only euler and heun have it"),
        (json!({"sampler": "sde", "steps": 1}), "steps", "takes 2 to"),
        (json!({"model": "gpt-image-1"}), "model", "there is tiny, latents"),
        (json!({"response_format": "url"}), "response_format", "b64_json or png"),
        (json!({"response_format": "png", "n": 2}), "response_format", "for one image"),
        (json!({"output_format": "webp"}), "output_format", "expected png"),
        (json!({"partial_images": 2}), "partial_images", "stream"),
        (json!({"partial_images": 99, "stream": true}), "partial_images", "from 0 to 50"),
        (json!({"stream": "yes"}), "stream", "true or false"),
        (json!({"quality": "hd"}), "quality", "auto or standard"),
        (json!({"background": "transparent"}), "background", "expected auto or opaque"),
        (json!({"timeout_ms": 0}), "timeout_ms", "from 1 to"),
        (json!({"negative_prompt": "blurry"}), "negative_prompt", "no such field"),
    ] {
        let mut body = json!({"class_label": 0});
        for (name, value) in change.as_object().unwrap() {
            body[name] = value.clone();
        }
        let status = if field == "model" { 404 } else { 400 };
        let named = post(server.address(), IMAGES, &body).refuses(status, word);
        assert_eq!(named.as_deref(), Some(field), "{change}");
    }
    let missing = post(server.address(), IMAGES, &json!({"steps": 2})).refuses(400, "give a class");
    assert_eq!(missing.as_deref(), Some("class_label"));
}

#[test]
fn a_stream_shows_the_image_as_it_forms() {
    let server = Running::start(options());
    let body = json!({"class_label": 1, "steps": 8, "seed": 5, "n": 2, "stream": true, "partial_images": 3});
    let events: Vec<Value> = Events::open(server.address(), &body).collect();
    assert_eq!(events.last(), Some(&json!("[DONE]")));
    let of = |kind: &str, sample: u64| -> Vec<&Value> {
        let kind = format!("image_generation.{kind}");
        events.iter().filter(|e| e["type"] == kind.as_str() && e["sample"] == sample).collect()
    };
    let whole =
        post(server.address(), IMAGES, &json!({"class_label": 1, "steps": 8, "seed": 5, "n": 2})).expect(200);
    for sample in 0..2 {
        let steps: Vec<_> = of("progress", sample).iter().map(|e| e["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, (1..=8).collect::<Vec<_>>());
        let partial = of("partial_image", sample);
        let indices: Vec<_> = partial.iter().map(|e| e["partial_image_index"].as_u64().unwrap()).collect();
        assert_eq!(indices, [0, 1, 2]);
        assert!(partial.iter().all(|e| picture(&decode(e["b64_json"].as_str().unwrap())).width() == 4));
        let done = of("completed", sample);
        assert_eq!((done.len(), done[0]["seed"].as_u64()), (1, Some(5 + sample)));
        assert!(decode(done[0]["b64_json"].as_str().unwrap()) == pictures(&whole)[sample as usize]);
    }
    // What is wrong before the first event is an answer of its own.
    let wrong = json!({"class_label": 1, "steps": 0, "stream": true});
    post(server.address(), IMAGES, &wrong).refuses(400, "steps");
    // What goes wrong later is an event, and the last one.
    let late = json!({"class_label": 1, "steps": 1000, "n": 10, "stream": true, "timeout_ms": 30});
    let events: Vec<Value> = Events::open(server.address(), &late).collect();
    assert_eq!(events.last().unwrap()["error"]["code"], "deadline", "{:?}", events.last());
}

#[test]
fn jobs_are_submitted_polled_and_deleted() {
    let server = Running::start(options());
    let at = server.address();
    let submitted = post(at, "/v1/images/jobs", &json!({"class_label": 2, "steps": 4, "seed": 3}));
    let place = submitted.header("location").unwrap().to_owned();
    let id = submitted.expect(202)["id"].as_str().unwrap().to_owned();
    assert_eq!(place, format!("/v1/images/jobs/{id}"));
    let mut job = Value::Null;
    until("the job's end", || {
        job = get(at, &place).expect(200);
        job["status"] != "running"
    });
    assert_eq!(job["status"], "succeeded", "{job}");
    let direct = post(at, IMAGES, &json!({"class_label": 2, "steps": 4, "seed": 3})).expect(200);
    assert!(pictures(&job["result"]) == pictures(&direct));
    assert_eq!(send(at, "DELETE", &place, "", b"").expect(200)["deleted"], true);
    get(at, &place).refuses(404, "there is no job");

    // A running one is cancelled by its deletion.
    let long = post(at, "/v1/images/jobs", &json!({"class_label": 2, "steps": 1000, "n": 10})).expect(202);
    let place = format!("/v1/images/jobs/{}", long["id"].as_str().unwrap());
    send(at, "DELETE", &place, "", b"").expect(200);
    until("an empty queue", || super::client::counter(at, "mudit_queue_image_steps") == 0.0);
    // One that fails says why.
    let late = json!({"class_label": 2, "steps": 1000, "n": 10, "timeout_ms": 20});
    let late = post(at, "/v1/images/jobs", &late).expect(202);
    let place = format!("/v1/images/jobs/{}", late["id"].as_str().unwrap());
    until("the job's end", || get(at, &place).expect(200)["status"] == "failed");
    assert_eq!(get(at, &place).json()["error"]["code"], "deadline");
    post(at, "/v1/images/jobs", &json!({"class_label": 2, "stream": true})).refuses(400, "polled");
    get(at, "/v1/images/jobs/job-1").refuses(404, "job-1");
}

#[test]
fn the_server_describes_itself() {
    let server = Running::start(options());
    let at = server.address();
    let models = get(at, "/v1/models").expect(200);
    assert_eq!((&models["data"][0]["id"], &models["data"][1]["id"]), (&json!("tiny"), &json!("latents")));
    assert_eq!(get(at, "/v1/models/latents").expect(200)["latent_shape"], json!([4, 8, 8]));
    get(at, "/v1/models/none").refuses(404, "there is no model");
    let info = get(at, "/info").expect(200);
    for model in info["models"].as_array().unwrap() {
        let engine = &model["engine"];
        assert_eq!(engine["determinism"]["exact"], true, "{engine}");
        let measured = engine["measured"]["points"].as_array().unwrap();
        assert!(measured.len() >= 4 && measured.iter().all(|p| p["seconds"].as_f64().unwrap() > 0.0));
        assert!(!engine["in_use"]["points"].as_array().unwrap().is_empty());
        assert_eq!(model["queue"]["limit_image_steps"], 1_000_000);
    }
    assert!(!info.to_string().contains(".safetensors"), "a path of the server is told: {info}");
    assert_eq!(get(at, "/health").expect(200)["status"], "ok");
    post(at, IMAGES, &json!({"class_label": 0, "steps": 2})).expect(200);
    let metrics = get(at, "/metrics").text();
    for line in ["mudit_images_total 1", "mudit_ready 1", "mudit_orders_finished_total 1"] {
        assert!(metrics.lines().any(|l| l == line), "{line}: {metrics}");
    }
    assert!(metrics.contains(r#"mudit_requests_total{route="/v1/images/generations",code="200"} 1"#));

    // The page and the documentation load nothing from elsewhere.
    for path in ["/", "/style.css", "/app.js", "/docs", "/docs.js"] {
        let file = get(at, path);
        assert_eq!(file.status, 200, "{path}");
        assert!(file.header("content-security-policy").unwrap().contains("default-src 'self'"));
        assert!(
            !file.text().contains("://") && !file.text().contains("src=\"//"),
            "{path} has an outside address"
        );
    }
    get(at, "/nothing").refuses(404, "there is no GET /nothing");
    get(at, IMAGES).refuses(405, "does not take GET");
}

#[test]
fn the_openapi_document_is_that_of_the_routes() {
    let server = Running::start(options());
    let document = get(server.address(), "/openapi.json").expect(200);
    for (path, methods) in document["paths"].as_object().unwrap() {
        let path = path.replace("{model}", "tiny").replace("{version}", "1").replace("{id}", "none");
        for method in methods.as_object().unwrap().keys() {
            let reply = send(server.address(), &method.to_uppercase(), &path, "", b"");
            let routed = reply.status != 405 && (reply.status != 404 || path.contains("none"));
            assert!(routed, "{method} {path}: {}", reply.status);
        }
    }
    // Every field of the document is a field of the server, and the other way round.
    let request = &document["components"]["schemas"]["ImageRequest"];
    let fields: BTreeSet<&str> =
        request["properties"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(request["additionalProperties"], false);
    for field in fields {
        // An array is wrong for each of them but one, and then it is this field that is named.
        let reply = post(server.address(), IMAGES, &json!({"class_label": 0, "steps": 1, field: [[]]}));
        assert_eq!(reply.refuses(400, field).as_deref(), Some(field));
    }
}
