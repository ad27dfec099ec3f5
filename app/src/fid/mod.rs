//! The offline FID benchmark: how far samples are from real images, with everything that is needed to compare the numbers.
//!
//! | module | holds |
//! |---|---|
//! | [`source`] | where images come from |
//! | [`extractor`] | feature networks run over batches of images |
//! | [`plan`] | what is computed of which images, and its shards |
//! | [`part`] | features of a shard on disk: exact sums, safe from crashes |
//! | [`resuming`] | whether a part's images are still the ones of its features |
//! | [`pass`] | images → network → part, once each |
//! | [`metrics`] | from features to numbers |
//! | [`evaluation`] | from parts to a reference file or to all metrics |
//! | [`statistics`] | the reference file |
//! | [`report`] | a result, and what may be compared with it |

pub mod evaluation;
pub mod extractor;
pub mod metrics;
pub mod part;
pub mod pass;
pub mod plan;
pub mod report;
pub mod resuming;
pub mod source;
pub mod statistics;
