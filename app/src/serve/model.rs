//! A model that is served: what it is called, what may be asked of it, and how that becomes an order.

use std::path::PathBuf;
use std::sync::Arc;

use models::{Guidance, Model, SolverPlan};
use runtime::SharedArena;

use crate::built::BuiltEngine;

/// Where a model's programs come from.
#[derive(Clone, Debug)]
pub enum Origin {
    /// They are compiled over these parameters.
    Parameters(SharedArena),
    /// They are in an engine, with their parameters.
    Engine(Arc<BuiltEngine>),
}

/// A model with its parameters and its name.
#[derive(Clone, Debug)]
pub struct Source {
    /// What clients call it.
    pub name: String,
    /// What it is.
    pub model: Model,
    /// Its programs.
    pub origin: Origin,
    /// Channels that guidance changes.
    pub guided: Guidance,
    /// Where the parameters were read; told to nobody but the operator.
    pub file: PathBuf,
    /// SHA-256 of that file.
    pub sha256: String,
}

impl Source {
    /// Axis sizes of an image: (C, H, W).
    pub fn shape(&self) -> [usize; 3] {
        self.model.latent().shape()
    }

    /// Values of an image.
    pub fn values(&self) -> usize {
        self.model.latent().values()
    }

    /// The size of a picture as clients write it.
    pub fn size(&self) -> String {
        let latent = self.model.latent();
        format!("{}x{}", latent.width, latent.height)
    }

    /// The name of a class; its number where it has none.
    pub fn class_name(&self, label: i64) -> String {
        let names = self.model.class_names.as_deref().unwrap_or_default();
        match usize::try_from(label).ok() {
            Some(i) if Some(i) == self.model.conditioning().null_class() => "none".to_owned(),
            Some(i) => names.get(i).cloned().unwrap_or_else(|| label.to_string()),
            None => label.to_string(),
        }
    }

    /// The plan of a solver on this model.
    ///
    /// # Errors
    /// The solver does not fit the model, or an option is out of range.
    pub fn plan(&self, solver: &models::Solver) -> Result<Arc<SolverPlan>, models::ModelError> {
        solver.plan(self.model.objective, self.model.learns_variance()).map(Arc::new)
    }
}
