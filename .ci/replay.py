"""train_gan.py replayed: the same run on an NVIDIA card, with far less waiting.

python .ci/replay.py --epochs 40 --device cuda    # takes all flags of train_gan.py

A step is about 150 small kernels, and launching them one by one takes longer than
running them. Here, each kind of turn (k steps of D, one of G) is played once, recorded
as a CUDA graph, and from then on replayed: one launch for all its kernels.

Only kernels are recorded. Python code inside play() does not run again: a counter or a
learning rate stands still, and .item() or a print of a tensor is an error. To change
play(), run train_gan.py.
"""

import sys
from collections import defaultdict
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gan

play = train_gan.play
update_average = train_gan.update_average
choose_device = train_gan.choose_device
recordings = WeakKeyDictionary()  # for each G, by the kind of turn


def replay(args, images, batches, D_steps, G_steps, *players):
    """What play() does, turn by turn, with the same arguments."""
    log = defaultdict(list)
    for first in range(0, len(batches), args.k):
        turn = batches[first : first + args.k]
        G_steps += 1
        decay = min(args.ema, (1 + G_steps) / (10 + G_steps))
        columns = replay_turn(args, images, turn, D_steps, decay, players)
        for name, values in columns.items():
            log[name].extend(values)
        D_steps += len(turn)
    return log


def replay_turn(args, images, batches, D_steps, decay, players):
    """The columns of losses.csv for this turn, each as one tensor."""
    known = recordings.setdefault(players[0], {})  # those of this G
    phase = D_steps % train_gan.R1_EVERY  # decides which steps have the R1 penalty
    kind = phase, *map(len, batches)
    if kind in known:
        graph, own_batches, own_decay, columns = known[kind]
        for own, batch in zip(own_batches, batches):
            own.copy_(batch)
        own_decay.fill_(decay)
        graph.replay()
        return {name: values.clone() for name, values in columns.items()}

    # A recording reads and writes the very tensors that it was made with: they stay
    # alive beside it. The decay is float64, as Python's numbers are.
    own_batches = [batch.clone() for batch in batches]
    own_decay = torch.full((), decay, dtype=torch.float64, device=images.device)

    def average(G_ema, G, decay):  # `decay` is a number: it would stand still
        update_average(G_ema, G, own_decay)

    def play_turn():
        train_gan.update_average = average
        try:
            log = play(args, images, own_batches, phase, 0, *players)
        finally:
            train_gan.update_average = update_average
        return {name: torch.stack(values).detach() for name, values in log.items()}

    played = play_turn()  # makes Adam's moments, too
    graph = torch.cuda.CUDAGraph()
    pool = None  # of memory, one for all recordings
    for other, *_ in known.values():
        pool = other.pool()
    set_capturable(players[3:5], True)
    try:
        with torch.cuda.device(images.device), torch.cuda.graph(graph, pool):
            columns = play_turn()
    except RuntimeError as error:
        # After an error, the end of the recording is another one. Show the first.
        raise (error.__context__ or error) from None
    finally:
        set_capturable(players[3:5], False)
    known[kind] = graph, own_batches, own_decay, columns
    return played


def set_capturable(optimizers, yes):
    """Adam is recorded only if it is capturable. Where it is played, it would warn."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["capturable"] = yes


def choose_card(name):
    """choose_device(), for CUDA only: nothing is read or written before it."""
    device = choose_device(name)
    if not device.startswith("cuda"):
        sys.exit(f"error: no CUDA graphs on {device}: run train_gan.py itself")
    return device


def main(argv=None):
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA here: run train_gan.py itself")
    train_gan.choose_device = choose_card
    train_gan.play = replay
    return train_gan.main(argv)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    main()
