//! Built programs are loaded, run and judged before anybody sees them.

use std::time::Instant;

use anyhow::Context;
use models::DitConfig;
use runtime::SessionOptions;
use runtime::engine::{EngineDraft, open_model_file_name};

use super::BuildEngineArgs;
use super::built_for::Target;
use super::open::profiles;
use super::stages::{Stage, Stages};
use super::validation::{Case, Report};
use crate::console;

impl BuildEngineArgs {
    /// Loads each program, compares its answers with the reference's and times a run. Nothing, where nobody here can
    /// run them.
    pub(super) fn try_out(
        &self,
        target: &Target,
        model: &DitConfig,
        draft: &mut EngineDraft,
        refitted: bool,
        stages: &mut Stages,
    ) -> anyhow::Result<Vec<Report>> {
        let Some(provider) = self.provider.0.as_ref().filter(|_| target.elsewhere().is_none()) else {
            return Ok(Vec::new());
        };
        let runtime = self.machine.runtime_for(provider)?;
        let manifest = draft.engine()?.manifest().clone();
        let open = |name: &str| manifest.open_programs.iter().any(|p| p.name == name);
        let mut reports = Vec::new();
        for group in manifest.programs.chunk_by(|a, b| a.name == b.name && open(&a.name)) {
            let [first, ..] = group else { continue };
            let shared = open(&first.name);
            let (file, shapes) = if shared {
                (open_model_file_name(&first.name), profiles(group))
            } else {
                (first.file.clone(), Vec::new())
            };
            stages.begin(Stage::Load, &file);
            let start = Instant::now();
            let (provider, compiled) = target.building(&file, shapes, draft.directory(), refitted)?;
            let options = SessionOptions {
                threads: self.machine.threads,
                provider,
                record_placement: self.explain,
                ..SessionOptions::default()
            };
            let (engine, batches) = (draft.engine()?, group.iter().map(|p| p.batch).collect::<Vec<_>>());
            let sessions = if shared && !refitted {
                let session = engine.open_session(&runtime, &first.name, &options)?;
                group.iter().map(|p| session.at(&p.inputs, &p.outputs)).collect::<Result<Vec<_>, _>>()?
            } else {
                engine.sessions(&runtime, &first.name, &batches, &options)?
            };
            let load_seconds = start.elapsed().as_secs_f64();
            if let Some(file) = compiled {
                draft.add_compiled(&first.name, &batches, &file)?;
            }
            if self.explain
                && !self.json
                && let Some(session) = sessions.first()
            {
                let placement = session.placement()?;
                let places =
                    placement.by_provider().into_iter().map(|(who, nodes)| format!("{nodes} nodes on {who}"));
                console::out(&format!("{file}: {}", places.collect::<Vec<_>>().join(", ")))?;
            }
            for (p, session) in group.iter().zip(&sessions) {
                let case = Case {
                    model,
                    kind: p.name.parse()?,
                    batch: p.batch,
                    guidance: self.cfg_channels,
                    precision: self.precision,
                    weights: self.weights.as_deref(),
                };
                stages.begin(Stage::Validate, &p.file);
                let place = || format!("trying {}", p.file);
                reports.push(case.run(session, load_seconds, !self.no_validation).with_context(place)?);
            }
        }
        Ok(reports)
    }
}
