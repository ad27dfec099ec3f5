//! What can be wrong with a model's configuration, its noise schedule or the way it is to be sampled.

use std::{io, path::PathBuf};

use crate::{objective::Objective, solver::SolverKind};

/// The error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A key that no configuration has.
    #[error("unknown key \"{key}\" in {place}; {hint}")]
    UnknownKey {
        /// The object that holds the key: `model config`, `mup`.
        place: &'static str,
        /// The key as written.
        key: String,
        /// The nearest valid name, or all of them.
        hint: String,
    },
    /// Required keys that were not given.
    #[error("{place} lacks {}; add {}", .keys.join(", "), if .keys.len() == 1 { "it" } else { "them" })]
    MissingKeys {
        /// The object that should hold the keys.
        place: &'static str,
        /// Every missing key, in the order of the constructor.
        keys: Vec<&'static str>,
    },
    /// A key whose value has the wrong JSON type.
    #[error("{key} must be {expected}, got {got}")]
    WrongType {
        /// The key, dotted when nested.
        key: String,
        /// The type that is wanted.
        expected: &'static str,
        /// The value as written.
        got: String,
    },
    /// A value of the right type that makes no model.
    #[error("{key} must be {expected}, got {got}")]
    BadValue {
        /// The key, dotted when nested.
        key: &'static str,
        /// The values that are allowed, with the numbers they follow from.
        expected: String,
        /// The value given.
        got: String,
    },
    /// The text of a configuration is not JSON.
    #[error("the model config is not valid JSON: {source}")]
    NotJson {
        /// Where the text stops being JSON.
        #[source]
        source: serde_json::Error,
    },
    /// A configuration file cannot be read.
    #[error("cannot read the model config {}: {source}", .path.display())]
    ReadConfig {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// What is wrong inside a configuration file.
    #[error("{}: {source}", .path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// The fault in it.
        #[source]
        source: Box<ModelError>,
    },
    /// Neither a preset nor a configuration file.
    #[error("\"{text}\" is neither a preset, a .json file nor a directory with a config.json; {hint}")]
    UnknownModel {
        /// The model as asked for.
        text: String,
        /// The nearest preset, or all of them.
        hint: String,
    },
    /// A preset followed by overrides that cannot be read.
    #[error("\"{text}\": {reason}; write PRESET[@HEIGHTxWIDTHxCHANNELS][:CLASSES], as in DiT-S/2@8x8x4:10")]
    BadOverride {
        /// The model as asked for.
        text: String,
        /// The part that is wrong.
        reason: String,
    },
    /// No class has this name or number.
    #[error("{}", no_class(.text, .known))]
    UnknownClass {
        /// The class as written.
        text: String,
        /// What may stand for a class.
        known: String,
    },
    /// A name or number that more than one class goes by.
    #[error("`{text}` means more than one class: {meanings}")]
    AmbiguousClass {
        /// The class as written.
        text: String,
        /// Each class with a spelling of its own.
        meanings: String,
    },
    /// A specification of timesteps that gives no schedule.
    #[error("steps \"{spec}\": {reason}")]
    BadSpacing {
        /// The specification as written.
        spec: String,
        /// Why it gives no schedule, and what would.
        reason: String,
    },
    /// A noise schedule of a length for which the linear betas leave `(0, 1)`.
    #[error(
        "a linear-beta schedule of {total} steps does not exist: the betas scale with 1000/steps, so at least {least} steps are needed"
    )]
    ScheduleTooShort {
        /// The length asked for.
        total: usize,
        /// The shortest length that works.
        least: usize,
    },
    /// No solver of this name.
    #[error("unknown solver \"{name}\"; {hint}")]
    UnknownSolver {
        /// The name as written.
        name: String,
        /// The nearest name, or all of them.
        hint: String,
    },
    /// A solver for another objective than the model's.
    #[error("solver {solver} cannot sample a model trained with the {objective} objective; use {}", .usable.join(", "))]
    SolverObjective {
        /// The solver asked for.
        solver: SolverKind,
        /// What the model was trained with.
        objective: Objective,
        /// The solvers that fit.
        usable: Vec<&'static str>,
    },
    /// A solver option that this solver has not, or that is out of range.
    #[error("solver {solver}: {option} must be {expected}, got {got}")]
    SolverOption {
        /// The solver asked for.
        solver: SolverKind,
        /// The option.
        option: &'static str,
        /// What it may be here.
        expected: &'static str,
        /// The value given.
        got: String,
    },
    /// No program has this name.
    #[error("no program is called \"{name}\"; {hint}")]
    UnknownProgram {
        /// The name as written.
        name: String,
        /// The nearest program, or all of them.
        hint: String,
    },
    /// The graph of a program cannot be built.
    #[error(transparent)]
    Graph(#[from] graph_builder::GraphError),
}

fn no_class(text: &str, known: &str) -> String {
    match text.parse::<u64>() {
        Ok(number) => format!("class {number} is not in {known}"),
        Err(_) => format!("no class is called `{text}`: expected {known}"),
    }
}
