//! The sampling server on loopback: what it answers, that images do not depend on their company, and how it bears load.

mod api;
mod bodies;
pub(crate) mod client;
mod connections;
mod hostile;
mod inference;
mod load;
mod process;
mod refusals;
mod same;

use std::net::SocketAddr;
use std::ops::Deref;
use std::path::Path;
use std::time::Duration;

use models::{Guidance, Model};
use mudit::execution::Execution;
use mudit::serve::engine::EngineOptions;
use mudit::serve::http::Limits;
use mudit::serve::http::auth::Keys;
use mudit::serve::model::{Origin, Source};
use mudit::serve::{ServeOptions, Server};
use mudit_tests::draws::Draws;
use mudit_tests::execution::onnx_runtime;
use runtime::Arena;
use train_engine::step::parameter_layout;

use crate::scene::fixture;
use crate::tiny;

/// 8 × 8 × 4 latents of 10 classes, DDPM with learned variance.
const DDPM: &str = "dit-d48-h4-p2";

/// The fixture's model with the reference's weights.
pub(crate) fn ddpm() -> Source {
    let file = fixture(DDPM, "weights.safetensors");
    let model = Model::resolve(&fixture(DDPM, "config.json").display().to_string()).unwrap();
    let layout = parameter_layout(&model.parameters().unwrap()).unwrap();
    let parameters = Arena::read_safetensors(&layout, &file, false).unwrap().into_shared();
    let origin = Origin::Parameters(parameters);
    let guided = Guidance::First(3);
    Source { name: "latents".into(), model, origin, guided, file, sha256: String::new() }
}

/// The tiny flow model on grey 4 × 4 pictures, with names for its three classes.
fn flow() -> Source {
    named(["dot", "dash", "ring"])
}

/// The same with other names.
fn named(names: [&str; 3]) -> Source {
    let names = names.map(str::to_owned).to_vec();
    let model = Model { class_names: Some(names), ..tiny::config("flow") };
    let layout = parameter_layout(&model.parameters().unwrap()).unwrap();
    let mut arena = Arena::zeros(layout.clone()).unwrap();
    for (name, entry) in layout.entries() {
        let values = Draws::named(name).uniform(entry.shape.dims(), -0.4, 0.4);
        for (to, from) in arena.view_mut(name).unwrap().iter_mut().zip(values.iter()) {
            *to = *from as f32;
        }
    }
    let file = Path::new("tiny.safetensors").into();
    let origin = Origin::Parameters(arena.into_shared());
    Source { name: "tiny".into(), model, origin, guided: Guidance::All, file, sha256: String::new() }
}

pub(crate) fn options() -> ServeOptions {
    ServeOptions {
        addresses: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
        engine: EngineOptions {
            execution: Execution::cpu(2),
            deterministic: true,
            max_rows: 8,
            max_queue: Some(1_000_000),
            remeasure: false,
            cache: None,
        },
        limits: Limits::default(),
        keys: Keys::default(),
        drain_delay: Duration::ZERO,
        drain_timeout: Duration::from_secs(20),
    }
}

/// A server that is drained when it goes.
pub(crate) struct Running {
    server: Option<Server>,
}

impl Running {
    /// The grey tiny model (first) and the latents.
    fn start(options: ServeOptions) -> Self {
        Self::of(vec![flow(), ddpm()], options)
    }

    pub(crate) fn of(sources: Vec<Source>, options: ServeOptions) -> Self {
        let server = Server::bind(sources, options).unwrap();
        server.load(&onnx_runtime()).unwrap();
        Self { server: Some(server) }
    }
}

impl Deref for Running {
    type Target = Server;
    fn deref(&self) -> &Server {
        self.server.as_ref().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.drain();
        }
    }
}
