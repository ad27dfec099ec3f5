//! `mudit sweep submit`: scripts for clusters. Workers share the trials by number, so nothing but the folder is shared.

use std::path::PathBuf;

use clap::Args;
use runtime::file::write_atomically;

use super::{Machine, Which};
use crate::console;
use crate::{STOPPED, Usage};

/// Arguments of `mudit sweep submit`.
#[derive(Debug, Args)]
pub(super) struct SubmitArgs {
    #[command(flatten)]
    which: Which,
    /// Write a SLURM array job.
    #[arg(long, required_unless_present = "k8s", conflicts_with = "k8s")]
    slurm: bool,
    /// Write a Kubernetes indexed Job.
    #[arg(long)]
    k8s: bool,
    /// Workers; at most one a trial.
    #[arg(long, default_value_t = 8)]
    tasks: usize,
    /// SLURM: limit of one task, as `sbatch --time` takes it.
    #[arg(long, default_value = "24:00:00")]
    time: String,
    /// GPUs of one task; 0 is none.
    #[arg(long, default_value_t = 0)]
    gpus: usize,
    /// CPU cores of one task.
    #[arg(long, default_value_t = 8)]
    cpus: usize,
    /// Kubernetes: image that has `mudit`.
    #[arg(long, requires = "k8s")]
    image: Option<String>,
    /// Kubernetes: claim of the volume that is mounted where the sweep's folder lies.
    #[arg(long, requires = "k8s")]
    claim: Option<String>,
    /// File of the script; left out, standard output.
    #[arg(long)]
    script: Option<PathBuf>,
    #[command(flatten)]
    machine: Machine,
}

impl SubmitArgs {
    pub(super) fn run(self) -> anyhow::Result<()> {
        if self.tasks == 0 || self.cpus == 0 {
            return Err(Usage("--tasks and --cpus must be 1 or more".into()).into());
        }
        let opened = self.which.open(self.machine, true)?;
        let tasks = self.tasks.min(opened.plan.trials.len()).max(1);
        let folder = std::path::absolute(&opened.folder)?;
        let folder = folder.display().to_string();
        let text = if self.slurm { self.slurm(tasks, &folder) } else { self.kubernetes(tasks, &folder)? };
        match &self.script {
            None => console::out(text.trim_end()),
            Some(path) => {
                write_atomically(path, |out| out.write_all(text.as_bytes()))?;
                let submit = if self.slurm { "sbatch" } else { "kubectl apply -f" };
                console::out(&format!("{submit} {}", console::quoted(path)))
            }
        }
    }

    fn slurm(&self, tasks: usize, folder: &str) -> String {
        let gpus =
            if self.gpus > 0 { format!("#SBATCH --gpus-per-task={}\n", self.gpus) } else { String::new() };
        format!(
            "#!/bin/bash\n\
             #SBATCH --job-name=mudit-sweep\n\
             #SBATCH --array=0-{last}\n\
             #SBATCH --ntasks=1\n\
             #SBATCH --cpus-per-task={cpus}\n\
             {gpus}\
             #SBATCH --time={time}\n\
             #SBATCH --requeue\n\
             #SBATCH --open-mode=append\n\
             #SBATCH --signal=USR1@120\n\
             #SBATCH --output=\"{output}/slurm-%A_%a.out\"\n\
             # A task that is started again goes on with the trials that have no result; no trial is ever done twice.\n\
             srun mudit sweep run --offline --out {quoted}{provider} --threads {cpus} --index \"$SLURM_ARRAY_TASK_ID\" --of {tasks}\n\
             code=$?\n\
             # {STOPPED} is stopped, before the time limit or by a preemption: it goes on. 2 is wrong usage: again would be the same.\n\
             if [ \"$code\" -eq {STOPPED} ] ||\n\
             \x20   {{ [ \"$code\" -ne 0 ] && [ \"$code\" -ne 2 ] && [ \"${{SLURM_RESTART_COUNT:-0}}\" -lt 20 ]; }}; then\n\
             \x20   scontrol requeue \"${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}\"\n\
             fi\n\
             exit \"$code\"\n",
            last = tasks - 1,
            cpus = self.cpus,
            time = self.time,
            quoted = console::quoted(folder),
            // In a pattern `%` begins a number of the job.
            output = folder.replace('%', "%%"),
            provider = self.provider(),
        )
    }

    fn kubernetes(&self, tasks: usize, folder: &str) -> anyhow::Result<String> {
        let (Some(image), Some(claim)) = (&self.image, &self.claim) else {
            return Err(Usage("--k8s needs --image IMAGE and --claim VOLUME-CLAIM".into()).into());
        };
        let gpus = if self.gpus > 0 {
            format!("              nvidia.com/gpu: {}\n", self.gpus)
        } else {
            String::new()
        };
        let q = |text: &str| serde_json::to_string(text); // a JSON string is a YAML string
        Ok(format!(
            r#"apiVersion: batch/v1
kind: Job
metadata:
  generateName: mudit-sweep-
spec:
  completionMode: Indexed
  completions: {tasks}
  parallelism: {tasks}
  backoffLimitPerIndex: 10
  podFailurePolicy:
    rules:
      # Stopped by a signal, or its node went: started again, which is no failure.
      - action: Ignore
        onExitCodes: {{containerName: worker, operator: In, values: [{STOPPED}]}}
      - action: Ignore
        onPodConditions: [{{type: DisruptionTarget}}]
      # Wrong usage: again would be the same.
      - action: FailIndex
        onExitCodes: {{containerName: worker, operator: In, values: [2]}}
  template:
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 60
      containers:
        - name: worker
          image: {image}
          command: ["/bin/sh", "-c"]
          args: [{run}]
          resources:
            limits:
              cpu: {cpus}
{gpus}          volumeMounts:
            - name: sweep
              mountPath: {mount}
      volumes:
        - name: sweep
          persistentVolumeClaim:
            claimName: {claim}
"#,
            image = q(image)?,
            claim = q(claim)?,
            cpus = self.cpus,
            mount = q(folder)?,
            run = q(&format!(
                "exec mudit sweep run --offline --out {}{} --threads {} --index \"$JOB_COMPLETION_INDEX\" --of {tasks}",
                console::quoted(folder),
                self.provider(),
                self.cpus
            ))?,
        ))
    }
}

impl SubmitArgs {
    /// The workers' option, where it was given.
    fn provider(&self) -> String {
        self.which.target.provider.as_ref().map_or(String::new(), |p| format!(" --provider {p}"))
    }
}
