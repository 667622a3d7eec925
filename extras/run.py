"""What keeps a run alive, so that train.py's loop need not: several processes, signals, resuming,
atomic saves, log lines, unreadable videos, stalled loaders, collapse, exit codes.

`Run` is the part that the loop sees, with three calls: steps, batches and report.
"""
import contextlib
import ctypes
import errno
import hashlib
import json
import math
import multiprocessing
import os
import secrets
import signal
import sys
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

try:
    import fcntl
except ImportError:  # Windows has no such locks, and fewer signals
    fcntl = None
STOP_SIGNALS = [signal.Signals[name] for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
                if hasattr(signal, name)]
GRACE = 3  # seconds in which more signals are echoes of the first: Slurm and torchrun both send one
LOG_STEPS, LOG_SECONDS, SAVE_SECONDS = 10, 10, 600  # between log lines, saves
TICKS = 20  # into which a time limit is divided
MAX_UNREADABLE = 0.01  # share of the videos; or five, if that is more


class RunError(UserError):
    """A run that can't continue; its message says why and what is left."""
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
    else:  # keep large freed blocks: to get them anew, page by page, takes up to a third of a step
        call_libc("mallopt", -4, 0)
        call_libc("mallopt", -1, 2 ** 31 - 1)
    if WORLD > 1 or dist.is_torchelastic_launched():  # others wait while one renders or downloads
        dist.init_process_group("nccl" if GPU else "gloo", timeout=timedelta(hours=1))


def call_libc(name, *numbers):
    """Calls a function of glibc or Linux, if this system has it."""
    with contextlib.suppress(TypeError, OSError, AttributeError):
        getattr(ctypes.CDLL(None), name)(*numbers)


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


def gather_dict(mine):
    """The union of every rank's dictionary; waits for all."""
    return {key: value for part in gather(mine) for key, value in part.items()}


def same_for_all(what, value):
    """Raises UserError if ranks have different values: what the sentence calls them."""
    values = gather(value)
    if other := next((rank for rank, there in enumerate(values) if there != values[0]), None):
        raise UserError(f"{what} differ between processes: rank 0 has {values[0]}, rank {other} "
                        f"{values[other]}; all nodes need the same files")


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
    """Calls give_up(), which must raise, if the block takes longer; time in which the process was
    suspended does not count. No limit on systems without SIGALRM."""
    ticks = [TICKS]  # that are left: of those that a suspended process misses one alone comes

    def tick(number, frame):
        ticks[0] -= 1
        if ticks[0] <= 0:
            give_up()

    handlers = handle({signal.SIGALRM: tick}) if hasattr(signal, "SIGALRM") else {}
    if handlers:
        signal.setitimer(signal.ITIMER_REAL, seconds / TICKS, seconds / TICKS)
    try:
        yield
    finally:
        if handlers:
            signal.setitimer(signal.ITIMER_REAL, 0)
        handle(handlers)


# --- The loader -----------------------------------------------------------------------------------

def start_worker(worker):
    """Signals to stop go to a whole group of processes, but workers must live until the training
    process has saved; and they must not outlive it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    call_libc("prctl", 1, 9)  # Linux's PR_SET_PDEATHSIG, SIGKILL: killed when the parent ends


def kill_workers():
    """Ends loader workers that an error has left behind: they ignore Python's own signal."""
    workers = multiprocessing.active_children()
    handlers = {}
    if workers and hasattr(signal, "SIGCHLD"):  # torch would take it for another error
        handlers = handle({signal.SIGCHLD: signal.SIG_DFL})
    for worker in workers:
        worker.kill()
        worker.join()
    handle(handlers)


def open_videos():
    """The videos that this process and its workers have open now, where /proc tells (Linux)."""
    processes = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
    links = [link for number in processes for link in Path(f"/proc/{number}/fd").glob("*")]
    files = {os.path.realpath(link) for link in links}
    return sorted(file for file in files if Path(file).suffix.lower() in SUFFIXES)


def loader(clips, batch, keys, workers, timeout=300):
    """Yields a Batch of the clips that the keys name, `batch` of them in each. Raises RunError if
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
    file = open(Path(out, ".lock"), "wb")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # else a file system without locks: drafts have names of their own
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"another process is at work in {out}: wait for its end, or choose "
                            "another folder") from error
    for draft in Path(out).glob("*.unfinished"):  # of a killed process
        draft.unlink(missing_ok=True)
    return file


@contextlib.contextmanager
def draft_of(path):
    """Another name to write to, which becomes `path` when the block ends, and is gone if it fails:
    the file is complete, or as it was before. Its mode is what the user's umask asks for."""
    path = Path(path)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        yield draft
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path, content):
    """Writes JSON on the first rank alone: complete, or not at all."""
    if RANK == 0:
        with draft_of(path) as draft:
            draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_atomically(path, content):
    """torch.save: complete, or not at all. Raises RunError."""
    try:
        with draft_of(path) as draft:
            torch.save(content, draft)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into the latter
        raise RunError(f"{path} can't be written ({error}); what was there before is untouched, "
                       "and the same command resumes from it") from error


def saved_run(args):
    """The checkpoint in --out, None if there is none. Raises UserError if flags contradict it, or
    if not all ranks see it."""
    seen = gather(Path(args.out, "last.pt").exists())
    if len(set(seen)) > 1:
        raise UserError(f"{args.out}/last.pt is there for rank {seen.index(True)} but not for rank "
                        f"{seen.index(False)}: --out must be a folder that all nodes share")
    if not seen[0]:
        return None
    saved, free = read_checkpoint(args.out), set(
        "root val out teacher batch_size accum amp workers timeout compile eval_every keep_every "
        "max_steps views ideas".split())
    flags, ideas = saved.get("args", {}), getattr(args, "ideas", [])
    if flags.get("ideas", ideas) != ideas:
        raise UserError(f"the run in {args.out} was started with {flags['ideas'] or 'no'} classes "
                        f"of its own, not with {ideas or 'none'}: resume it with these, or choose "
                        "another --out")
    differ = [f"--{name.replace('_', '-')} {now} (the run has {flags[name]})"
              for name, now in vars(args).items() if now is not None  # --init may be left out
              and name not in free and name in flags and flags[name] != now
              and not (name == "init" and flags[name] and os.path.realpath(flags[name])
                       == os.path.realpath(now))]
    if differ:
        raise UserError(f"the run in {args.out} resumes with its own settings, but you give "
                        f"{', '.join(differ)}: leave them out, or choose another --out")
    return saved


# --- A run ----------------------------------------------------------------------------------------

def collapsed(line, k, tubes):
    """Whether a log line from after warmup shows collapsed features. Of SIGMA, with k prototypes: a
    term of the loss stuck at ln k or at 0, or an entropy far below ln k (or ln of the hidden tubes,
    if fewer). Of l2: both networks' features are nearly constant."""
    if "l2_term" in line:
        return max(line["video_std"], line["projection_std"]) < 0.01
    if not {"video_term", "projection_term", "video_entropy", "projection_entropy"} <= line.keys():
        return False
    terms, log_k = (line["projection_term"], line["video_term"]), math.log(k)
    stuck = any(abs(term / log_k - 1) < 0.01 or term < 0.05 * log_k for term in terms)
    entropy = min(line["video_entropy"], line["projection_entropy"])
    return stuck or entropy < math.log(min(k, tubes)) - 1.4


def hash_of(clips):
    """(number of videos, a hash of their names and labels in order, wherever they lie)."""
    names = "\n".join(f"{os.path.basename(path)} {label}" for path, label in clips.videos)
    return len(clips), hashlib.sha256(os.fsencode(names)).hexdigest()[:16]


class Run:
    """Keeps a training run alive. The loop is

        for step in run.steps():
            for part, batch in run.batches(accum): ...
            run.report(loss=..., grad_norm=..., **stats)

    to the last step, --max-steps or a signal; then run.complete says whether all steps are done.

    batch: clips per forward pass; per_step: clips of a step, of all processes; steps: of the whole
    run; collapse_from: the step from which features may be called collapsed. facts: what else its
    checkpoints hold. saved: what saved_run returned. probe(title): figures for the log, every
    --eval-every epochs. Raises RunError when the run can't continue.
    """

    def __init__(self, args, model, optimizer, scaler, clips, *, batch, per_step, steps,
                 collapse_from=0, facts=None, saved=None, probe=None):
        self.args, self.model, self.clips, self.facts, self.probe = args, model, clips, facts, probe
        self.optimizer, self.scaler, self.per_step = optimizer, scaler, per_step
        self.step, self.total_steps, self.collapse_from = 0, steps, collapse_from
        self.stop_step = min(steps, args.max_steps or steps)
        self.out, self.k = Path(args.out), len(getattr(model, "prototypes", ()))
        self.flags = vars(args) | ({"init": saved["args"].get("init")} if saved else {})
        self.signals, self.stopped, self.bad_lines = [], False, 0
        self.rows, self.unreadable, self.reported, self.waited = [], {}, set(), 0.0
        same_for_all("the videos (their number, and a hash of names and labels)", hash_of(clips))
        if dist.is_initialized():
            self.control = dist.new_group(backend="gloo")  # for two numbers a step
        self.lock = claim(self.out) if RANK == 0 else contextlib.nullcontext()
        if saved:
            self.resume(saved)
        self.open_log(saved)
        if not saved:
            self.save()  # a disk that can't be written to shows now
        videos = batch // args.repeat  # per forward pass; the keys count them
        keys = endless_order(len(clips), videos, RANK, WORLD, args.seed,
                             self.step * per_step // args.repeat)
        self.loader = loader(clips, videos, keys, args.workers, args.timeout)

    @property
    def complete(self):
        return self.step >= self.total_steps

    def resume(self, saved):
        """Puts back the state of a checkpoint."""
        if saved["videos"] != len(self.clips):
            raise UserError(f"the run in {self.out} has {saved['videos']:,} videos, there are now "
                            f"{len(self.clips):,}: start a new one with --init {self.out} and "
                            "another --out")
        fill(self.model, saved["model"], self.out)
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty after a run in another precision than fp16
            self.scaler.load_state_dict(saved["scaler"])
        self.step = saved["clips_seen"] // self.per_step

    def open_log(self, saved):
        """Starts log.jsonl, or drops its lines of steps that will be repeated."""
        self.log_time = self.save_time = time.monotonic()
        if RANK == 0:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.truncate(min(saved["log_size"], file.tell()) if saved else 0)

    def save(self, name="last.pt"):
        """Writes a checkpoint."""
        self.save_time = time.monotonic()
        if RANK == 0:
            save_atomically(self.out / name, dict(
                model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(), args=self.flags, **self.facts,
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
        handlers = handle(dict.fromkeys(STOP_SIGNALS, self.stop))
        bar = progress(total=self.total_steps, initial=self.step, unit="step", disable=RANK > 0)
        try:
            while self.step < self.stop_step and not self.stopped:
                yield self.step
                self.step += 1
                bar.update()
                if self.something_due():
                    self.log_and_save(bar)
        finally:
            bar.close()
            self.loader.close()
            handle(handlers)
            self.lock.__exit__(None, None, None)
        if not self.complete:
            log(f"stopped after step {self.step:,} of {self.total_steps:,}; run the same command "
                "again to resume")

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

    def crosses_epoch(self, every):
        """Whether this step completes a multiple of so many epochs."""
        now, then = (step * self.per_step // len(self.clips) for step in (self.step, self.step - 1))
        return bool(every) and now // every > then // every

    def something_due(self):
        """Whether there is something to do after this step. All ranks agree on it, and until here
        nothing has waited for the GPU."""
        late = time.monotonic() - self.log_time > LOG_SECONDS or self.step % LOG_STEPS == 0
        flags = torch.tensor([len(self.signals), late], dtype=torch.int)
        if dist.is_initialized():
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        self.stopped, late = flags.bool().tolist()
        self.ends = self.stopped or self.step == self.stop_step
        return late or self.ends or any(map(self.crosses_epoch, (
            self.args.eval_every, self.args.keep_every)))

    def log_and_save(self, bar):
        """A log line, with a probe if one is due, and a checkpoint."""
        line, n = self.means(), len(self.clips)
        bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['clips_per_second']:.1f} clips/s, "
                            f"{line['data_wait']:.0%} waiting for data", refresh=False)
        self.name_unreadable()
        self.tell_collapse(line)
        probing = self.probe and self.crosses_epoch(self.args.eval_every)
        if probing:
            self.save()  # first: who stops the run may not wait for the probe
            line |= self.probe(f"epoch {line['epoch']:g}")
        self.write(line)
        too_many = len(self.reported) > max(min(5, n - 1), MAX_UNREADABLE * n)
        if self.ends or probing or too_many or time.monotonic() - self.save_time > SAVE_SECONDS:
            self.save()
        if self.crosses_epoch(self.args.keep_every):
            self.save(f"epoch-{self.step * self.per_step // n:04}.pt")
        if too_many:
            raise RunError(f"{len(self.reported)} of {n:,} videos can't be read, more than "
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
            first = "--amp off or bf16, then " if self.args.amp == "fp16" else ""
            raise RunError("the loss or its gradient is not finite at step "
                           f"{self.step - len(rows) + 1 + finite.index(False)}: start anew from the"
                           f" last good checkpoint, --init {self.out} and another --out, with "
                           f"{first}a lower --lr")
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
        for path, reason in gather_dict(self.unreadable).items():
            if path not in self.reported:
                log(f"unreadable video {path}: {reason}; another one takes its place")
            self.reported.add(path)
        self.unreadable = {}

    def tell_collapse(self, line):
        """Says once if ten log lines in a row show collapsed features."""
        collapse = self.step > self.collapse_from and collapsed(line, self.k, self.tubes)
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
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"unreadable_videos": len(self.reported)}) + "\n")


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
