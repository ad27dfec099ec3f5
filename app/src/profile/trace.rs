//! The trace that ONNX Runtime's profiler writes: runs of a session and the nodes in each.

use std::path::Path;

use anyhow::{Context, bail};
use serde_json::Value;

/// One run of a whole program.
#[derive(Clone, Debug)]
pub struct Run {
    /// From the call to its end, in milliseconds.
    pub ms: f64,
    /// The nodes in the order of their execution.
    pub nodes: Vec<Executed>,
}

/// One node that was executed.
#[derive(Clone, Debug, PartialEq)]
pub struct Executed {
    /// Its name in the model as ONNX Runtime rewrote it.
    pub name: String,
    /// Its operator, ONNX Runtime's own included.
    pub op: String,
    /// Milliseconds inside the kernel.
    pub ms: f64,
    /// Bytes of its operands and answers, each counted once; 0 where it only renames memory.
    pub bytes: u64,
    /// Most bytes that the session's allocator had given out while it ran; 0 where the trace does not tell.
    pub memory_peak: u64,
}

/// Operators that give their operand's memory another shape.
const VIEWS: [&str; 5] = ["Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"];

/// Reads a trace; the first of its runs, which allocates, is left out where there are more.
///
/// # Errors
/// The file cannot be read, or is no trace with at least one run.
pub fn read(path: &Path) -> anyhow::Result<Vec<Run>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("reading the profiler's trace `{}`", path.display()))?;
    parse(&text).with_context(|| format!("`{}` is no trace of ONNX Runtime's profiler", path.display()))
}

fn parse(text: &str) -> anyhow::Result<Vec<Run>> {
    let events: Vec<Value> = serde_json::from_str(text)?;
    let mut runs: Vec<(f64, Run)> = Vec::new();
    let mut nodes = Vec::new();
    for event in &events {
        let (Some(start), Some(length)) = (event["ts"].as_f64(), event["dur"].as_f64()) else { continue };
        match (event["cat"].as_str(), event["name"].as_str()) {
            (Some("Session"), Some("model_run")) => {
                runs.push((start, Run { ms: length / 1e3, nodes: Vec::new() }));
            }
            (Some("Node"), Some(name)) => {
                if let Some(name) = name.strip_suffix("_kernel_time") {
                    nodes.push((start, executed(name, length / 1e3, &event["args"])));
                }
            }
            _ => {}
        }
    }
    // A run is written after its nodes: both are put in the order of time.
    runs.sort_by(|a, b| a.0.total_cmp(&b.0));
    nodes.sort_by(|a, b| a.0.total_cmp(&b.0));
    for (start, node) in nodes {
        let run = runs.partition_point(|(began, _)| *began <= start);
        if let Some((_, run)) = run.checked_sub(1).and_then(|i| runs.get_mut(i)) {
            run.nodes.push(node);
        }
    }
    let first = usize::from(runs.len() > 1);
    let runs: Vec<Run> = runs.into_iter().skip(first).map(|(_, run)| run).collect();
    if runs.iter().all(|run| run.nodes.is_empty()) {
        bail!("it holds no node of a run");
    }
    Ok(runs)
}

fn executed(name: &str, ms: f64, args: &Value) -> Executed {
    let op = args["op_name"].as_str().unwrap_or_default().to_owned();
    let moved = if VIEWS.contains(&op.as_str()) {
        0
    } else {
        tensors(&args["input_type_shape"]) + tensors(&args["output_type_shape"])
    };
    let number = |key: &str| args[key].as_str().and_then(|t| t.parse().ok()).unwrap_or(0);
    Executed { name: name.to_owned(), op, ms, bytes: moved, memory_peak: number("mem_in_use_peak") }
}

/// Bytes of a list such as `[{"float": [2, 64]}, {"int64": []}]`.
fn tensors(list: &Value) -> u64 {
    let entries = list.as_array().into_iter().flatten().filter_map(Value::as_object).flatten();
    entries
        .map(|(dtype, shape)| {
            let size = match dtype.as_str() {
                "double" | "int64" | "uint64" => 8,
                "float" | "int32" | "uint32" => 4,
                "float16" | "bfloat16" | "int16" | "uint16" => 2,
                _ => 1,
            };
            let dims = shape.as_array().into_iter().flatten().filter_map(Value::as_u64);
            size * dims.product::<u64>()
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_belong_to_the_run_that_holds_them() {
        let node = |name: &str, ts: u64, dur: u64| {
            format!(
                r#"{{"cat":"Node","ts":{ts},"dur":{dur},"name":"{name}_kernel_time","args":{{"op_name":"Add",
                "input_type_shape":[{{"float":[2,3]}},{{"float":[]}}],"output_type_shape":[{{"float":[2,3]}}],
                "mem_in_use_peak":"640"}}}}"#
            )
        };
        let run = |ts: u64, dur: u64| {
            format!(r#"{{"cat":"Session","ts":{ts},"dur":{dur},"name":"model_run","args":{{}}}}"#)
        };
        let events = [
            r#"{"cat":"Session","ts":1,"dur":5,"name":"session_initialization","args":{}}"#.to_owned(),
            node("a", 11, 4),
            run(10, 9),
            node("b", 32, 5),
            node("a", 31, 1),
            run(30, 10),
        ];
        let runs = parse(&format!("[{}]", events.join(","))).unwrap();
        assert_eq!(runs.len(), 1, "the first run allocates");
        assert_eq!(runs[0].ms, 0.01);
        let names: Vec<&str> = runs[0].nodes.iter().map(|n| n.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!((runs[0].nodes[1].ms, runs[0].nodes[1].bytes), (0.005, 4 * (6 + 1 + 6)));
        assert_eq!(runs[0].nodes[0].memory_peak, 640);
        // A lone run is better than none.
        assert_eq!(parse(&format!("[{},{}]", node("a", 11, 4), run(10, 9))).unwrap().len(), 1);
    }

    #[test]
    fn what_is_no_trace_is_refused() {
        for text in ["", "{}", "[]", r#"[{"cat":"Session","ts":1,"dur":2,"name":"model_run"}]"#] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_view_moves_nothing() {
        let shapes =
            serde_json::json!({"op_name": "Reshape", "input_type_shape": [{"float": [8]}, {"int64": [1]}]});
        assert_eq!(executed("r", 1.0, &shapes).bytes, 0);
        let copy = serde_json::json!({"op_name": "Cast", "input_type_shape": [{"bool": [8]}], "output_type_shape": [{"int64": [8]}]});
        assert_eq!(executed("c", 1.0, &copy).bytes, 72);
    }
}
