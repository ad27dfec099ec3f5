//! Built programs are loaded, run and judged before anybody sees them.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use models::Model;
use runtime::engine::{EngineDraft, EngineProgram};
use runtime::provider::ShapeProfile;
use runtime::{Engine, Provider, Session, SessionOptions};

use super::BuildEngineArgs;
use super::built_for::Target;
use super::open::profiles;
use super::parameters::Source;
use super::stages::{Stage, Stages};
use super::validation::{Case, Report};

/// One model file that is to be loaded.
struct Form<'a> {
    file: &'a str,
    /// The programs that it is.
    programs: &'a [EngineProgram],
    /// Shapes that it is for, where its batch size is open.
    shapes: Vec<ShapeProfile>,
}

/// Loads the sessions of a form's programs.
type Load<'a> = &'a dyn Fn(&Engine, &SessionOptions) -> runtime::Result<Vec<Arc<Session>>>;

impl BuildEngineArgs {
    /// Loads each program, compares its answers with the reference's and times a run. A program for all batch sizes is
    /// tried at each of them. Nothing, where nobody here can run them.
    pub(super) fn try_out(
        &self,
        target: &Target,
        model: &Model,
        weights: Option<&Source<'_>>,
        draft: &mut EngineDraft,
        stages: &mut Stages,
    ) -> anyhow::Result<Vec<Report>> {
        let Some(provider) = self.provider.0.as_ref().filter(|_| target.elsewhere().is_none()) else {
            return Ok(Vec::new());
        };
        let runtime = self.machine.runtime_for(provider)?;
        let manifest = draft.engine()?.manifest().clone();
        let mut reports = Vec::new();
        for group in manifest.programs.chunk_by(|a, b| a.name == b.name) {
            let [EngineProgram { name, .. }, ..] = group else { continue };
            let open = manifest.open_programs.iter().find(|p| p.name == *name);
            let (mut shared, mut shared_seconds) = (Vec::new(), 0.0);
            if let Some(open) = open {
                let form = Form { file: &open.file, programs: group, shapes: profiles(group) };
                let load: Load<'_> = &|engine, options| {
                    let session = engine.open_session(&runtime, name, options)?;
                    group.iter().map(|p| session.at(&p.inputs, &p.outputs)).collect()
                };
                (shared, shared_seconds) = self.load(target, draft, &form, stages, load)?;
            }
            // TensorRT compiles one of the two only.
            let fixed = open.is_none() || !matches!(provider, Provider::TensorRt(_));
            for (i, p) in group.iter().enumerate() {
                let (mut forms, mut load_seconds) = (Vec::new(), shared_seconds);
                if fixed {
                    let form = Form { file: &p.file, programs: std::slice::from_ref(p), shapes: Vec::new() };
                    let load: Load<'_> =
                        &|engine, options| engine.sessions(&runtime, name, &[p.batch], options);
                    (forms, load_seconds) = self.load(target, draft, &form, stages, load)?;
                }
                forms.extend(shared.get(i).cloned());
                let case = Case {
                    model,
                    kind: name.parse()?,
                    batch: p.batch,
                    guidance: self.guidance(model),
                    precision: self.precision,
                    weights: weights.map(Source::path),
                };
                stages.begin(Stage::Validate, &p.file);
                let place = || format!("trying {}", p.file);
                reports.push(case.run(&forms, load_seconds, !self.no_validation).with_context(place)?);
            }
        }
        Ok(reports)
    }

    /// Loads a form, with the time that it took. What its provider compiled of it, and who runs its nodes, go into the draft.
    fn load(
        &self,
        target: &Target,
        draft: &mut EngineDraft,
        form: &Form<'_>,
        stages: &mut Stages,
        load: Load<'_>,
    ) -> anyhow::Result<(Vec<Arc<Session>>, f64)> {
        stages.begin(Stage::Load, form.file);
        let start = Instant::now();
        let shapes = form.shapes.clone();
        let (provider, compiled) = target.building(form.file, shapes, draft.directory())?;
        let wanted = provider.onnx_runtime_name();
        let options = SessionOptions {
            threads: self.machine.threads,
            provider: provider.computing_in(self.precision.dtype()),
            record_placement: true,
            ..SessionOptions::default()
        };
        let sessions = load(&draft.engine()?, &options)?;
        let seconds = start.elapsed().as_secs_f64();
        if let (Some(file), [first, ..]) = (compiled, form.programs) {
            let batches: Vec<usize> = form.programs.iter().map(|p| p.batch).collect();
            draft.add_compiled(&first.name, &batches, &file)?;
        }
        if let Some(session) = sessions.first() {
            let placement = session.placement()?.summary(wanted);
            draft.manifest_mut().placements.insert(form.file.to_owned(), placement);
        }
        Ok((sessions, seconds))
    }
}
