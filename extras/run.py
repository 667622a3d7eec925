"""What keeps a run alive, so that train.py's loop need not: several processes, signals, resuming,
atomic saves, log lines, unreadable videos, stalled loaders, collapse, exit codes.

`Run` is the part that the loop sees, with three calls: steps, batches and report.
"""
import contextlib
import ctypes
import errno
import fcntl
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import SUFFIXES, collate, endless_order, progress
from sigma import UserError, fill, read_checkpoint

STOP_SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP
GRACE = 3  # seconds in which more signals are echoes of the first: Slurm and torchrun both send one
LOG_STEPS, LOG_SECONDS, SAVE_SECONDS = 10, 10, 600  # between log lines, saves
MAX_UNREADABLE = 0.01  # share of the videos; or five, if that is more


class RunError(UserError):
    """A run that can't go on; its message says why and what is left."""
    code = 1


# --- Processes and devices ------------------------------------------------------------------------

def from_launcher(name, default):
    """A number that torchrun puts into the environment; set_up complains if it is none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


RANK, WORLD, LOCAL_RANK = (from_launcher(name, default) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", LOCAL_RANK) if GPU else torch.device("cpu")
BF16 = GPU and torch.cuda.is_bf16_supported(including_emulation=False)
AMP = "bf16" if BF16 else "fp16" if GPU else "off"  # the fastest that this machine has


def set_up():
    """Joins the processes that torchrun started, if it did. Raises UserError if the environment
    tells only a part of how."""
    given = os.environ
    wrong = [f"{name}={given[name]!r}" for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")
             if not given.get(name, "0").isdecimal()]
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not given.get(name)]
    if WORLD > 1 and missing:
        wrong.append(f"WORLD_SIZE={WORLD} without {', '.join(missing)}")
    if wrong or RANK >= WORLD:
        raise UserError(f"the environment has {' and '.join(wrong) or f'RANK={RANK} of {WORLD}'}: "
                        "start several processes with torchrun, and one without such variables")
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs: 0.1% of the assignments change
    if GPU:
        if LOCAL_RANK >= torch.cuda.device_count():
            raise UserError(f"process {LOCAL_RANK} of this machine has no GPU of its own, there are"
                            f" {torch.cuda.device_count()}: lower --nproc_per_node")
        torch.cuda.set_device(DEVICE)
    elif hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc: keep large freed blocks, since
        libc.mallopt(-4, 0)  # getting them anew, page by page, takes up to a third of a step
        libc.mallopt(-1, 2 ** 31 - 1)
    if WORLD > 1 or dist.is_torchelastic_launched():  # others wait while one renders or downloads
        dist.init_process_group("nccl" if GPU else "gloo", timeout=timedelta(hours=1))


def log(text):
    """Prints above the progress bar, on the first rank alone. A run outlives its terminal, and file
    names that the terminal can't show."""
    if RANK == 0:
        coding = getattr(sys.stdout, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError):
            tqdm.write(text.encode(coding, "backslashreplace").decode(coding))


def gather(thing=None):
    """The list of every rank's thing; waits for all."""
    things = [thing] * WORLD
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


def one_first(work):
    """work() in one process of each machine, then in all, which find what it has left."""
    if LOCAL_RANK == 0:
        work()
    gather()
    return work()


def autocast(amp):
    """The context that --amp names."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(DEVICE.type, dtype, enabled=amp != "off")


# --- Signals --------------------------------------------------------------------------------------

def handle(handlers):
    """Sets {signal: handler} and returns those that were there. Leaves alone what the caller's
    shell ignores (nohup), and does nothing in a thread that may not set any."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number, handler in handlers.items()
            if signal.getsignal(number) is not signal.SIG_IGN}


@contextlib.contextmanager
def time_limit(seconds, give_up):
    """Calls give_up(), which must raise, if the block takes longer."""
    before = handle({signal.SIGALRM: lambda number, frame: give_up()})
    signal.alarm(seconds if before else 0)
    try:
        yield
    finally:
        signal.alarm(0)
        handle(before)


# --- The loader -----------------------------------------------------------------------------------

def start_worker(worker):
    """Signals to stop go to a whole group of processes, but workers must live until the training
    process has saved; and they must not outlive it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # Linux's PR_SET_PDEATHSIG: killed when the parent ends


def kill_workers():
    """Ends loader workers that an error has left behind: they ignore Python's own signal."""
    workers = multiprocessing.active_children()
    before = handle({signal.SIGCHLD: signal.SIG_DFL}) if workers else {}  # torch would take it for
    for worker in workers:  # another error
        worker.kill()
        worker.join()
    handle(before)


def open_videos():
    """The videos that this process and its workers have open now, where /proc tells (Linux)."""
    processes = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
    links = [link for number in processes for link in Path(f"/proc/{number}/fd").glob("*")]
    files = {os.path.realpath(link) for link in links}
    return sorted(file for file in files if Path(file).suffix.lower() in SUFFIXES)


def loader(clips, batch, keys, workers, timeout=300):
    """Yields a Batch of the clips that the keys name, `batch` of them at a time. Raises RunError if
    the next one takes longer than timeout seconds."""
    def give_up():
        raise RunError(f"the loader gave no batch in {timeout} s, is a disk stalled? Its workers "
                       f"have open: {', '.join(open_videos()) or 'no video, or not known'}")

    batches = iter(DataLoader(clips, batch, sampler=keys, num_workers=workers, collate_fn=collate,
                              worker_init_fn=start_worker, pin_memory=GPU))
    while True:
        with time_limit(timeout, give_up):  # PyTorch's own limit waits for a stopped worker
            samples = next(batches, None)
        if samples is None:
            return
        yield samples


# --- Files of a run -------------------------------------------------------------------------------

def claim(out):
    """Makes a run's folder and locks it until the returned file is closed or this process ends.
    Raises UserError if another process is at work there."""
    Path(out).mkdir(parents=True, exist_ok=True)
    file = open(Path(out, ".lock"), "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"another process is at work in {out}: wait for its end, or choose "
                            "another folder") from error
        # Else a file system without locks: drafts have names of their own all the same.
    for draft in Path(out).glob("*.unfinished"):  # of a killed process
        draft.unlink(missing_ok=True)
    return file


def save_atomically(path, content):
    """torch.save under another name, then renamed: the file is complete or not there."""
    path, draft = Path(path), None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.",
                                         suffix=".unfinished", delete=False) as file:
            draft = Path(file.name)
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(0o666 & ~os.umask(os.umask(0)))  # temporary files are private
        draft.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into the latter
        if draft:
            draft.unlink(missing_ok=True)
        raise RunError(f"{path} can't be written ({error}); what was there before is untouched, "
                       "and the same command goes on from it") from error


def saved_run(args):
    """The checkpoint in --out, None if there is none. Raises UserError if flags contradict it."""
    if not Path(args.out, "last.pt").exists():
        return None
    saved, free = read_checkpoint(args.out), set(
        "root val out teacher batch_size accum amp workers timeout compile eval_every keep_every "
        "max_steps views clips".split())
    kind = getattr(args, "clips", None)
    if saved["args"].get("clips", kind) != kind:
        raise UserError(f"the run in {args.out} was started by the other one of train.py and "
                        "extras/motion.py: resume it with that")
    differ = [f"--{name.replace('_', '-')} {now} (the run has {saved['args'][name]})"
              for name, now in vars(args).items() if now is not None  # --init may be left out
              and name not in free and name in saved["args"] and saved["args"][name] != now]
    if differ:
        raise UserError(f"the run in {args.out} goes on with its own settings, but you give "
                        f"{', '.join(differ)}: leave them out, or choose another --out")
    return saved


# --- A run ----------------------------------------------------------------------------------------

def collapsed(line, k, tubes):
    """Whether a log line from after warmup shows collapsed features. Of SIGMA, with k prototypes: a
    term of the loss stuck at ln k or at 0, or an entropy far below ln k (or ln of the hidden tubes,
    if fewer). Of l2: both networks' features are nearly constant."""
    if "l2_term" in line:
        return max(line["video_std"], line["target_std"]) < 0.01
    if not k:
        return False
    terms, most = (line["target_term"], line["video_term"]), math.log(k)
    stuck = any(abs(term / most - 1) < 0.01 or term < 0.05 * most for term in terms)
    return stuck or min(line["entropy"], line["target_entropy"]) < math.log(min(k, tubes)) - 1.4


class Run:
    """Keeps a training run alive. The loop is

        for step in run.steps():
            for part, batch in run.batches(accum): ...
            run.report(loss=..., grad_norm=..., **stats)

    to the last step, --max-steps or a signal; then run.complete says whether all steps are done.

    batch: clips at a time; per_step: clips of a step, of all processes; steps: of the whole run;
    settled: the step from which features may be called collapsed. sizes: the model's, for its
    checkpoints. before: what saved_run returned. probe(title): figures for the log, every
    --eval-every epochs. Raises RunError when the run can't go on.
    """

    def __init__(self, args, model, optimizer, scaler, clips, *, batch, per_step, steps, settled=0,
                 sizes=None, before=None, probe=None):
        self.args, self.model, self.clips, self.sizes, self.probe = args, model, clips, sizes, probe
        self.optimizer, self.scaler, self.per_step = optimizer, scaler, per_step
        self.step, self.total, self.settled = 0, steps, settled
        self.last = min(steps, args.max_steps or steps)
        self.out, self.k = Path(args.out), len(getattr(model, "prototypes", ()))
        self.signals, self.stopped, self.bad_lines = [], False, 0
        self.rows, self.unreadable, self.named, self.waited = [], {}, set(), 0.0
        if dist.is_initialized():
            self.control = dist.new_group(backend="gloo")  # for two numbers a step
        self.lock = claim(self.out) if RANK == 0 else contextlib.nullcontext()
        if before:
            self.resume(before)
        if RANK == 0:
            with open(self.out / "log.jsonl", "a") as file:  # drop lines of steps to be repeated
                file.truncate(min(before["log_size"], file.tell()) if before else 0)
        self.log_time = self.save_time = time.monotonic()
        if not before:
            self.save()  # a disk that can't be written to shows now
        videos = batch // args.repeat  # at a time; the keys count them
        keys = endless_order(len(clips), videos, RANK, WORLD, args.seed,
                             self.step * per_step // args.repeat)
        self.loader = loader(clips, videos, keys, args.workers, args.timeout)

    @property
    def complete(self):
        return self.step >= self.total

    def resume(self, before):
        """Puts back the state of a checkpoint."""
        if before["videos"] != len(self.clips):
            raise UserError(f"the run in {self.out} has {before['videos']:,} videos, there are now "
                            f"{len(self.clips):,}: start a new one with --init {self.out} and "
                            "another --out")
        fill(self.model, before["model"], self.out)
        self.optimizer.load_state_dict(before["optimizer"])
        self.scaler.load_state_dict(before["scaler"])
        self.step = before["clips_seen"] // self.per_step

    def save(self, name="last.pt"):
        """Writes a checkpoint."""
        self.save_time = time.monotonic()
        if RANK == 0:
            save_atomically(self.out / name, dict(
                model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(), sizes=self.sizes, args=vars(self.args),
                clips_seen=self.step * self.per_step, videos=len(self.clips),
                log_size=(self.out / "log.jsonl").stat().st_size))
        gather()  # a process that ends before rank 0 has saved may end the whole job

    def stop(self, number, frame):
        """The handler of signals: the first one stops the run after its step, one that is no echo
        of it ends the process at once."""
        self.signals.append(time.monotonic())
        if self.signals[-1] - self.signals[0] > GRACE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif len(self.signals) == 1:
            time.sleep(0.5)  # echoes come now, not after a long call into C that looks like GRACE

    def steps(self):
        """Yields the number of each step that is left; between them signals, log and saves."""
        before = handle(dict.fromkeys(STOP_SIGNALS, self.stop))
        bar = progress(total=self.total, initial=self.step, unit="step", disable=RANK > 0)
        try:
            while self.step < self.last and not self.stopped:
                yield self.step
                self.step += 1
                bar.update()
                if self.agree():
                    self.between(bar)
        finally:
            bar.close()
            self.loader.close()
            handle(before)
            self.lock.__exit__(None, None, None)
        if not self.complete:
            log(f"stopped after step {self.step:,} of {self.total:,}; the same command goes on")

    def batches(self, accum):
        """Yields (part, Batch) for the parts 1 to accum of a step, and notes how long they took to
        come and what could not be read."""
        for part in range(1, accum + 1):
            asked = time.monotonic()
            batch = next(self.loader)
            self.waited += time.monotonic() - asked
            self.unreadable |= batch.bad
            self.tubes = 0 if batch.mask is None else int(batch.mask.sum())
            yield part, batch

    def report(self, **stats):
        """Notes what a step gave, scalar tensors by name; nothing waits for the GPU here."""
        self.names = list(stats)
        self.rows.append(torch.stack([value.float() for value in stats.values()]))

    def passed(self, every):
        """Whether this step completes a multiple of so many epochs."""
        now, then = (step * self.per_step // len(self.clips) for step in (self.step, self.step - 1))
        return bool(every) and now // every > then // every

    def agree(self):
        """Whether there is something to do after this step. All ranks agree on it, and until here
        nothing has waited for the GPU."""
        late = time.monotonic() - self.log_time > LOG_SECONDS or self.step % LOG_STEPS == 0
        flags = torch.tensor([len(self.signals), late], dtype=torch.int)
        if dist.is_initialized():
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        self.stopped, late = flags.bool().tolist()
        self.ends = self.stopped or self.step == self.last
        return late or self.ends or self.passed(self.args.eval_every) or self.passed(
            self.args.keep_every)

    def between(self, bar):
        """A log line, with a probe if one is due, and a checkpoint."""
        line, n = self.means(), len(self.clips)
        bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['clips_per_second']:.1f} clips/s, "
                            f"{line['data_wait']:.0%} waiting for data", refresh=False)
        self.name_unreadable()
        self.tell_collapse(line)
        probing = self.probe and self.passed(self.args.eval_every)
        if probing:
            self.save()  # first: who stops the run may not wait for the probe
            line |= self.probe(f"epoch {line['epoch']:g}")
        self.write(line)
        too_many = len(self.named) > max(min(5, n - 1), MAX_UNREADABLE * n)
        if self.ends or probing or too_many or time.monotonic() - self.save_time > SAVE_SECONDS:
            self.save()
        if self.passed(self.args.keep_every):
            self.save(f"epoch-{self.step * self.per_step // n:04}.pt")
        if too_many:
            raise RunError(f"{len(self.named)} of {n:,} videos can't be read, more than "
                           f"{MAX_UNREADABLE:.0%}: fix or remove those named above")
        self.log_time, self.waited = time.monotonic(), 0.0

    def means(self):
        """A log line: means over the steps since the last one, and over the ranks. Raises RunError
        if a loss is not finite."""
        rows, self.rows = torch.stack(self.rows) / WORLD, []
        if dist.is_initialized():
            dist.all_reduce(rows)
        # fp16 may overflow in gradients: the scaler skips such steps.
        finite = rows[:, :1 if self.scaler.is_enabled() else 2].isfinite().all(dim=1).tolist()
        if not all(finite):
            raise RunError("the loss or its gradient is not finite at step "
                           f"{self.step - len(rows) + 1 + finite.index(False)}: start anew from the"
                           f" last good checkpoint, --init {self.out}, another --out and a lower "
                           "--lr")
        seconds, seen = time.monotonic() - self.log_time, self.step * self.per_step
        line = dict(zip(self.names, rows.mean(dim=0).tolist()))
        if self.k:
            line["log_k"] = math.log(self.k)  # where the terms of the loss start
        return line | dict(step=self.step, epoch=seen / len(self.clips),
                           lr=self.optimizer.param_groups[0]["lr"],
                           data_wait=self.waited / seconds,
                           clips_per_second=len(rows) * self.per_step / seconds)

    def name_unreadable(self):
        """Names each video that some rank could not read, once."""
        for path, reason in [pair for part in gather(self.unreadable) for pair in part.items()]:
            if path not in self.named:
                log(f"unreadable video {path}: {reason}; another one takes its place")
            self.named.add(path)
        self.unreadable = {}

    def tell_collapse(self, line):
        """Says once if ten log lines in a row show collapsed features."""
        collapse = self.step > self.settled and collapsed(line, self.k, self.tubes)
        self.bad_lines = self.bad_lines + 1 if collapse else 0
        if self.bad_lines == 10:
            log("the features have collapsed: " + (
                "few prototypes are in use, or a term of the loss is near 0 or ln K; lower --lr or "
                "--eps, or raise --batch-size" if self.k else "they hardly differ from tube to tube"
                ", as when learned features are regressed; the targets mlp and dino prevent it"))

    def write(self, line):
        """Appends a line to log.jsonl; what is not finite becomes null, as JSON has no inf."""
        if RANK == 0:
            line = {name: x if math.isfinite(x) else None for name, x in line.items()}
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line | {"unreadable_videos": len(self.named)}) + "\n")


def launch(main, argv=None):
    """Runs main(argv), user errors without a traceback. Returns the exit code."""
    try:
        main(argv)
        return 0
    except UserError as error:
        code, message = error.code, error
    except OSError as error:  # about a file or a full disk: the user's; else a bug
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        code, message = 2, error
    except torch.OutOfMemoryError:
        code, message = 1, "out of GPU memory: lower --batch-size, or --size or --frames"
    except RuntimeError as error:
        if not str(error).startswith("DataLoader "):
            raise
        code, message = 1, f"{error}, perhaps for want of memory: lower --workers"
    except KeyboardInterrupt:
        code, message = 130, "stopped"
    finally:
        kill_workers()
        if dist.is_initialized():
            time.sleep(0.1)  # torch 2.6: gloo's threads still need Python to free tensors
            dist.destroy_process_group()
    if RANK:  # rank 0 reports first; torchrun then ends the others
        time.sleep(3)
    print(f"error: {message}", file=sys.stderr)
    return code
