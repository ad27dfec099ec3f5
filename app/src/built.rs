//! Engines that `mudit build-engine` made, as other commands run them: nothing is compiled here.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, anyhow};
use graph_builder::{Graph, Precision};
use models::{Guidance, Model, ModelError, ProgramKind};
use runtime::{Binding, Engine, Provider, Runtime, Session, SessionOptions};

use crate::Usage;
use crate::console::quoted;
use crate::execution::{Execution, Placed, draw_noise, tell_recording};
use crate::sampler::{channels, channels_text};

/// Batch sizes that a server is glad of, on the CPU and on GPUs.
const FOR_SERVERS: [&[usize]; 2] = [&[1, 2, 4, 8], &[1, 2, 4, 8, 16, 32, 64]];

/// An engine directory with what its manifest says of the model.
pub struct BuiltEngine {
    engine: Engine,
    model: Model,
    guided: Guidance,
    provider: Provider,
    precision: Precision,
    /// A session of each program that serves all batch sizes, as long as somebody uses it.
    loaded: Mutex<BTreeMap<&'static str, Weak<Session>>>,
}

/// Where a model's programs come from.
#[derive(Clone, Debug)]
pub enum ProgramSource {
    /// They are compiled over these parameters, which all share.
    Compiled(Placed),
    /// They are in an engine, with their parameters.
    Built(Arc<BuiltEngine>),
}

impl ProgramSource {
    /// The program of a kind and batch size, bound to its parameters; `graph` is it where it has to be compiled.
    ///
    /// # Errors
    /// As [`Placed::load`] and [`BuiltEngine::binding`].
    pub fn binding(
        &self,
        runtime: &Arc<Runtime>,
        (kind, batch): (ProgramKind, usize),
        graph: impl FnOnce() -> Result<Graph, ModelError>,
        execution: &Execution,
        options: &SessionOptions,
    ) -> anyhow::Result<Binding> {
        match self {
            Self::Compiled(parameters) => parameters.load(runtime, &graph()?, execution, options),
            Self::Built(engine) => engine.binding(runtime, kind, batch, options),
        }
    }
}

impl fmt::Debug for BuiltEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BuiltEngine").field("directory", &self.engine.directory()).finish_non_exhaustive()
    }
}

impl BuiltEngine {
    /// Whether a directory has an engine's manifest.
    pub fn is_at(directory: &Path) -> bool {
        directory.join(runtime::engine::MANIFEST).is_file()
    }

    /// Opens an engine directory.
    ///
    /// # Errors
    /// No engine, a file that is missing or has another size; an engine that is for nobody, or does not say of which model.
    pub fn open(directory: &Path) -> anyhow::Result<Self> {
        let place = || format!("`{}` is no engine that can be run", directory.display());
        let engine = Engine::open(directory).with_context(place)?;
        let manifest = engine.manifest();
        let model = serde_json::from_value(manifest.extra["model"].clone())
            .context("its manifest does not tell the model")
            .with_context(place)?;
        let option = |name: &str| {
            let text = manifest.options[name].as_str();
            text.with_context(|| format!("its manifest does not tell the {name}")).with_context(place)
        };
        let guided = channels(option("guided_channels")?).map_err(|e| anyhow!(e)).with_context(place)?;
        let precision = option("precision")?.parse().map_err(|e| anyhow!("{e}")).with_context(place)?;
        let provider = match option("provider")? {
            "none" => Err(anyhow!("it was only emitted: build it with --provider cpu, cuda or tensorrt")),
            name => name.parse().map_err(anyhow::Error::new),
        };
        let provider = provider.with_context(place)?;
        let loaded = Mutex::default();
        Ok(Self { engine, model, guided, provider, precision, loaded })
    }

    /// What it is an engine of.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Channels that guidance changes in its programs.
    pub fn guided(&self) -> Guidance {
        self.guided
    }

    /// Its weights file.
    pub fn weights_file(&self) -> PathBuf {
        let weights = self.engine.manifest().weights.as_ref();
        self.engine.directory().join(weights.map_or("", |w| w.file.as_str()))
    }

    /// SHA-256 of the weights that it was built from.
    pub fn weights_sha256(&self) -> Option<&str> {
        let weights = self.engine.manifest().weights.as_ref()?;
        Some(weights.source.as_ref().map_or(&weights.sha256, |source| &source.sha256))
    }

    /// What tells its program `kind` from every other one: the hashes of its models.
    pub fn identity(&self, kind: ProgramKind) -> String {
        let programs = &self.engine.manifest().programs;
        let programs = programs.iter().filter(|p| p.name == kind.name()).map(|p| p.sha256.as_str());
        programs.collect::<Vec<_>>().join(" ")
    }

    /// Batch sizes that it has a program for, ascending.
    pub fn batches(&self, kind: ProgramKind) -> Vec<usize> {
        let programs = self.engine.manifest().programs.iter();
        let mut batches: Vec<usize> = programs.filter(|p| p.name == kind.name()).map(|p| p.batch).collect();
        batches.sort_unstable();
        batches
    }

    /// How it is run: as it was built for, on another GPU of the kind if `provider` says so.
    ///
    /// # Errors
    /// [`Usage`] where another provider or precision is asked for than it was built for; what
    /// [`Execution::check_provider`] says.
    pub fn execution(
        &self,
        provider: Option<&Provider>,
        precision: Option<Precision>,
        threads: usize,
    ) -> anyhow::Result<Execution> {
        if let Some(asked) = provider.filter(|asked| asked.name() != self.provider.name()) {
            return Err(self.is_for("provider", &self.provider, asked));
        }
        if let Some(asked) = precision.filter(|asked| *asked != self.precision) {
            return Err(self.is_for("precision", &self.precision, &asked));
        }
        let provider = provider.unwrap_or(&self.provider).clone();
        let execution = Execution { provider, precision: self.precision, threads };
        execution.check_provider()?;
        Ok(execution)
    }

    /// Refuses other channels of guidance than its programs have.
    ///
    /// # Errors
    /// [`Usage`] naming both.
    pub fn check_guided(&self, asked: Guidance) -> anyhow::Result<()> {
        let all = self.model.latent().channels;
        let count = |guided| match guided {
            Guidance::Off => 0,
            Guidance::First(n) => all.min(n),
            Guidance::All => all,
        };
        if count(asked) == count(self.guided) {
            return Ok(());
        }
        Err(self.is_for("cfg-channels", &channels_text(self.guided), &channels_text(asked)))
    }

    fn is_for(&self, option: &str, built: &dyn fmt::Display, asked: &dyn fmt::Display) -> anyhow::Error {
        let place = self.engine.directory().display();
        let text = format!(
            "the engine `{place}` was built with --{option} {built}, and --{option} {asked} is asked for: leave it out, \
             or build an engine with it"
        );
        Usage(text).into()
    }

    /// Loads a program at a batch size; programs of one kind share what they have in common. Their inputs and outputs have
    /// memory of their own.
    ///
    /// # Errors
    /// It has no such program; its file was altered; what the provider says; no memory.
    pub fn binding(
        &self,
        runtime: &Arc<Runtime>,
        kind: ProgramKind,
        batch: usize,
        options: &SessionOptions,
    ) -> anyhow::Result<Binding> {
        let options = SessionOptions { provider: self.loading(&options.provider), ..options.clone() };
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let beside = loaded.get(kind.name()).and_then(Weak::upgrade);
        let session = self.engine.shared_session(runtime, kind.name(), batch, &options, beside.as_ref())?;
        loaded.insert(kind.name(), Arc::downgrade(&session));
        drop(loaded);
        tell_recording(&session);
        let mut builder = Binding::builder(&session);
        draw_noise(&session, &mut builder)?;
        Ok(builder.finish()?)
    }

    /// The provider as it loads what is built: TensorRT looks into no cache, and for weights that it was built without
    /// beside the engine.
    fn loading(&self, provider: &Provider) -> Provider {
        let mut provider = provider.clone();
        if let Provider::TensorRt(options) = &mut provider {
            (options.engine_cache, options.timing_cache) = (None, None);
            let without_weights = self.engine.manifest().key.get("strip-weights").is_some();
            options.weights_from = without_weights.then(|| self.engine.directory().to_path_buf());
        }
        provider
    }

    /// The error of an engine without a program that is needed: what it has, and the command that adds it. `least` is
    /// the smallest batch size that does.
    pub fn lacks(&self, kind: ProgramKind, least: usize) -> anyhow::Error {
        let place = self.engine.directory().display();
        let manifest = self.engine.manifest();
        let mut had: Vec<String> =
            manifest.programs.iter().map(|p| format!("{} at batch {}", p.name, p.batch)).collect();
        had.sort_unstable();
        let bigger = if least > 1 { format!(" at batch {least} or more") } else { String::new() };
        anyhow!(
            "the engine `{place}` has no program {kind}{bigger}, only {}; this adds it: {}",
            had.join(", "),
            self.command_with(kind)
        )
    }

    /// The command that builds it once more with a program that it lacks.
    fn command_with(&self, kind: ProgramKind) -> String {
        let (manifest, place) = (self.engine.manifest(), quoted(self.engine.directory()));
        let mut programs: Vec<&str> = Vec::new();
        for name in manifest.programs.iter().map(|p| p.name.as_str()).chain([kind.name()]) {
            if !programs.contains(&name) {
                programs.push(name);
            }
        }
        let mut buckets: Vec<usize> = manifest.programs.iter().map(|p| p.batch).collect();
        buckets.extend(FOR_SERVERS[usize::from(self.provider.is_gpu())]);
        buckets.sort_unstable();
        buckets.dedup();
        let buckets: Vec<String> = buckets.iter().map(ToString::to_string).collect();
        let weights = match &manifest.weights {
            Some(_) => quoted(self.weights_file()),
            None => "WEIGHTS.safetensors".to_owned(),
        };
        let mut words = vec![
            format!("mudit build-engine --model {place} --weights {weights}"),
            format!("--program {} --buckets {}", programs.join(","), buckets.join(",")),
            format!("--cfg-channels {} --precision {}", channels_text(self.guided), self.precision),
            format!("--provider {}", self.provider),
        ];
        for (part, option) in
            [("architecture", "for"), ("builder-level", "builder-level"), ("workspace", "workspace")]
        {
            words.extend(manifest.key.get(part).map(|value| format!("--{option} {value}")));
        }
        if manifest.key.get("strip-weights").is_some() {
            words.push("--strip-weights".to_owned());
        }
        words.push(format!("--out {place}"));
        words.join(" ")
    }
}
