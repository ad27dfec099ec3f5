//! The offline FID benchmark.
//!
//! | module | holds |
//! |---|---|
//! | [`extractor`] | feature networks run over batches of images |

pub mod extractor;
