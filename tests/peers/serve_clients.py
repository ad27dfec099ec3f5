"""Official clients against a running `mudit serve`: OpenAI's Python library, and Triton's HTTP client for the Open
Inference Protocol.

    python serve_clients.py http://127.0.0.1:8000      # needs openai, tritonclient[http], numpy, pillow
"""
import base64
import io
import os
import sys

import numpy
import openai
import tritonclient.http as triton
from PIL import Image

url = sys.argv[1].rstrip("/")
key = os.environ.get("MUDIT_API_KEY", "none-is-needed")


def pixels(text):
    return numpy.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


# --- OpenAI ---
client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
models = client.models.list().data
model = models[0].id
size = models[0].size
assert client.models.retrieve(model).id == model
settings = {"steps": 6, "guidance_scale": 2.0, "seed": 11}
answer = client.images.generate(model=model, prompt="1", n=2, size=size, response_format="b64_json", user="peer", extra_body=settings)
assert len(answer.data) == 2 and [d.seed for d in answer.data] == [11, 12]
first = pixels(answer.data[0].b64_json)
assert f"{first.shape[1]}x{first.shape[0]}" == size
again = client.images.generate(model=model, prompt="1", size="auto", quality="auto", extra_body=settings)
assert again.data[0].b64_json == answer.data[0].b64_json
print("openai: images.generate, models.list, models.retrieve")

kinds = []
stream = client.images.generate(model=model, prompt="1", stream=True, partial_images=2, extra_body=settings)
for event in stream:
    kinds.append(event.type)
    if event.type == "image_generation.partial_image":
        assert pixels(event.b64_json).shape == first.shape and event.partial_image_index in (0, 1)
    if event.type == "image_generation.completed":
        assert event.b64_json == answer.data[0].b64_json
assert kinds.count("image_generation.partial_image") == 2 and kinds.count("image_generation.completed") == 1, kinds
print("openai: stream with", len(kinds), "events")

try:
    client.images.generate(model=model, prompt="a cat in a hat")
    raise SystemExit("a prompt that is no class was taken")
except openai.BadRequestError as error:
    assert error.body["param"] == "prompt" and error.body["code"] == "invalid_value", error.body
try:
    client.images.generate(model="dall-e-3", prompt="1")
    raise SystemExit("an unknown model was taken")
except openai.NotFoundError as error:
    assert error.code == "model_not_found"
try:
    client.images.generate(model=model, prompt="1", n=10, extra_body={"steps": 1000, "timeout_ms": 30, "guidance_scale": 5},)
    raise SystemExit("a deadline was not kept")
except openai.InternalServerError as error:
    assert error.status_code == 504
print("openai: errors arrive as the library's own")

# --- Open Inference Protocol ---
def headers():
    """Anew for each call: the client notes the length of its JSON in the dictionary that it is given."""
    return {"authorization": f"Bearer {key}"}


v2 = triton.InferenceServerClient(url.removeprefix("http://"), concurrency=2)
assert v2.is_server_live() and v2.is_server_ready() and v2.is_model_ready(model) and v2.is_model_ready(model, "1")
metadata = v2.get_model_metadata(model)
assert v2.get_server_metadata()["name"] == "mudit" and metadata["name"] == model
assert [t["name"] for t in metadata["inputs"]] == ["class_label", "seed", "noise"]
labels, seeds = numpy.array([1, 1], numpy.int64), numpy.array([11, 12], numpy.uint64)
for binary in (True, False):
    inputs = [triton.InferInput("class_label", [2], "INT64"), triton.InferInput("seed", [2], "UINT64")]
    inputs[0].set_data_from_numpy(labels, binary_data=binary)
    inputs[1].set_data_from_numpy(seeds, binary_data=binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("image", "latent", "seed")]
    parameters = {"steps": 6, "guidance_scale": 2.0}
    result = v2.infer(model, inputs, outputs=outputs, parameters=parameters, headers=headers(), request_id="a")
    images = result.as_numpy("image")
    assert images.dtype == numpy.uint8 and result.get_response()["id"] == "a"
    # The same images as the other interface made.
    want = numpy.stack([pixels(d.b64_json) for d in answer.data]).reshape(images.shape)
    assert (images == want).all() and (result.as_numpy("seed") == seeds).all()
    assert result.as_numpy("latent").dtype == numpy.float32
inputs = [triton.InferInput("class_label", [1], "INT64")]
inputs[0].set_data_from_numpy(labels[:1])
assert v2.infer(model, inputs, headers=headers()).as_numpy("image").shape[0] == 1
try:
    v2.infer("none", inputs, headers=headers())
    raise SystemExit("an unknown model was taken")
except triton.InferenceServerException as error:
    assert "there is no model" in str(error)
print("tritonclient: health, metadata, infer in JSON and in bytes, errors")

config = v2.get_model_config(model)
assert [t["name"] for t in config["input"]] == ["class_label", "seed", "noise"] and config["max_batch_size"] == 0
for version in ("", "1"):
    stats = v2.get_inference_statistics(model, version)["model_stats"][0]
    assert stats["name"] == model and stats["inference_stats"]["success"]["count"] >= 3, stats
assert [m["name"] for m in v2.get_model_repository_index()] == [m.id for m in models]
assert v2.get_system_shared_memory_status() == [] and v2.get_cuda_shared_memory_status() == []
v2.unregister_system_shared_memory()
v2.unregister_cuda_shared_memory()
for what in (
    lambda: v2.load_model(model),
    lambda: v2.unload_model(model),
    lambda: v2.get_trace_settings(),
    lambda: v2.get_log_settings(),
    lambda: v2.get_model_config("none"),
    lambda: v2.get_system_shared_memory_status("region"),
    lambda: v2.register_system_shared_memory("region", "/key", 16),
    lambda: v2.infer(model, inputs, model_version="7", headers=headers()),
):
    try:
        what()
        raise SystemExit("what the server has not was answered")
    except triton.InferenceServerException as error:
        assert str(error), error
for algorithm in ("gzip", "deflate"):
    packed = v2.infer(model, inputs, headers=headers(), request_compression_algorithm=algorithm)
    assert packed.as_numpy("image").shape[0] == 1
print("tritonclient: configuration, statistics, repository, shared memory, packed bodies")
