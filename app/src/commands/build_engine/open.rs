//! One form of a program for all batch sizes.

use graph_builder::{Graph, OpenProgram, Weights};
use models::ProgramKind;
use runtime::engine::{EngineProgram, open_model_file_name};
use runtime::provider::ShapeProfile;

/// Batch sizes that show what of a program stems from the batch: they are hardly another size of a model.
const PROBES: [usize; 2] = [97, 101];

/// A program whose batch size will be open.
pub(super) struct PlannedOpen {
    kind: ProgramKind,
    /// At each of [`PROBES`], in the precision asked for.
    graphs: [Graph; 2],
}

impl PlannedOpen {
    /// `build` gives the program at a batch size.
    pub(super) fn new(
        kind: ProgramKind,
        build: impl Fn(usize) -> anyhow::Result<Graph>,
    ) -> anyhow::Result<Self> {
        Ok(Self { kind, graphs: [build(PROBES[0])?, build(PROBES[1])?] })
    }

    pub(super) fn file(&self) -> String {
        open_model_file_name(self.kind.name())
    }

    pub(super) fn emit(&self, weights: Weights<'_>) -> anyhow::Result<OpenProgram> {
        let [first, second] = [self.graphs[0].emit(weights)?, self.graphs[1].emit(weights)?];
        Ok(OpenProgram::of((PROBES[0], &first), (PROBES[1], &second))?)
    }
}

/// The shapes that an engine of one program at several batch sizes serves: one profile, from the smallest to the largest,
/// with the kernels that are best at the largest, where a server under load is and throughput is decided. TensorRT can have
/// a profile for each batch size, and ONNX Runtime's provider builds them all, but its execution context stays on the
/// first: inputs of another's shapes fail (microsoft/onnxruntime's pull request 31624, open in September 2026, is to
/// change that).
pub(super) fn profiles(programs: &[EngineProgram]) -> Vec<ShapeProfile> {
    let smallest = programs.iter().min_by_key(|p| p.batch);
    let largest = programs.iter().max_by_key(|p| p.batch);
    let (Some(smallest), Some(largest)) = (smallest, largest) else { return Vec::new() };
    let inputs = smallest.inputs.iter().zip(&largest.inputs).filter(|(min, max)| min.shape != max.shape);
    inputs
        .map(|(min, max)| ShapeProfile {
            input: max.name.clone(),
            min: min.shape.0.clone(),
            opt: max.shape.0.clone(),
            max: max.shape.0.clone(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use graph_builder::Precision;
    use models::{Guidance, Model, ProgramKind, ProgramSpec};

    use super::*;

    #[test]
    fn every_sampling_program_of_a_preset_can_leave_its_batch_open() {
        let model = Model::resolve("DiT-S/2@8x8x4:10").unwrap();
        for (kind, precision) in [
            (ProgramKind::Denoise, Precision::F32),
            (ProgramKind::DenoiseCfg, Precision::Bf16),
            (ProgramKind::Step, Precision::F16),
            (ProgramKind::StepRows, Precision::Bf16),
        ] {
            let build = |n| {
                let graph = model.compiled(&ProgramSpec::new(kind, n).guided(Guidance::First(3)))?;
                Ok(graph.in_precision(precision)?)
            };
            let open = PlannedOpen::new(kind, build).unwrap();
            assert_eq!(open.file(), format!("{kind}.onnx"));
            let emitted = open.emit(Weights::Inputs).unwrap();
            let fixed = build(4).unwrap().emit(Weights::Inputs).unwrap();
            assert_eq!((emitted.inputs_at(4), emitted.outputs_at(4)), (fixed.inputs, fixed.outputs));
        }
    }

    #[test]
    fn one_profile_spans_all_batch_sizes() {
        let model = Model::resolve("DiT-S/2@8x8x4:10").unwrap();
        let at = |batch| {
            let graph = model
                .program(&ProgramSpec::new(ProgramKind::DenoiseCfg, batch).guided(Guidance::First(3)))
                .unwrap();
            let inputs = graph.emit(Weights::Inputs).unwrap().inputs;
            EngineProgram {
                name: "denoise-cfg".into(),
                batch,
                file: String::new(),
                bytes: 0,
                sha256: String::new(),
                // Parameters do not grow with the batch.
                inputs,
                outputs: Vec::new(),
                native_ops: Vec::new(),
                unrepeatable: Vec::new(),
                compiled: None,
            }
        };
        let profiles = profiles(&[at(4), at(1), at(16)]);
        let names: Vec<&str> = profiles.iter().map(|p| p.input.as_str()).collect();
        assert_eq!(names, ["x", "t", "y", "guidance"]);
        let image = |n| vec![n, 4, 8, 8];
        assert_eq!(
            (&profiles[0].min, &profiles[0].opt, &profiles[0].max),
            (&image(1), &image(16), &image(16))
        );
    }
}
