//! Numbers and variables of the command line, judged before a command sees them.

use std::any::TypeId;
use std::env;

use clap::builder::{RangedU64ValueParser, Resettable};
use clap::{Arg, Command};
use runtime::session::MAX_THREADS;

/// Most of what has no limit of its own below.
const MOST: u64 = 1 << 20;
/// Most images of a set.
const MOST_IMAGES: u64 = 1_000_000_000;
/// Most samples of one run of a program.
const MOST_BATCH: u64 = 1 << 16;

/// The largest number an option takes; none where any will do.
fn most(option: &str) -> Option<u64> {
    match option {
        // Names of streams and places, not amounts; limits that somebody wants to lift; and those that
        // have a parser with a range of their own.
        "seed" | "first" | "max_body" | "max_queue" | "at_step" | "images_of_set" | "batch_of_sampler"
        | "batch_of_network" => None,
        "threads" => Some(MAX_THREADS as u64),
        "count" | "fid_images" | "keep" | "requests" => Some(MOST_IMAGES),
        "batch" | "buckets" | "concurrency" => Some(MOST_BATCH),
        _ => Some(MOST),
    }
}

/// The command with limits on the numbers that its options take, in which an empty variable of the environment is none.
pub(crate) fn judged(command: Command) -> Command {
    command.mut_args(judged_option).mut_subcommands(judged)
}

fn judged_option(option: Arg) -> Arg {
    let is_empty = |name| env::var_os(name).is_some_and(|value| value.is_empty());
    let option = if option.get_env().is_some_and(is_empty) { option.env(Resettable::Reset) } else { option };
    let (Some(most), kind) = (most(option.get_id().as_str()), option.get_value_parser().type_id()) else {
        return option;
    };
    // Other options of these types have no parser of their own.
    if kind == TypeId::of::<usize>() {
        option.value_parser(RangedU64ValueParser::<usize>::new().range(..=most))
    } else if kind == TypeId::of::<u64>() {
        option.value_parser(RangedU64ValueParser::<u64>::new().range(..=most))
    } else {
        option
    }
}
