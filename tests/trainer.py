"A training run in a process of its own, to be watched and killed: test_resume starts it."
import os, signal, sys
import torch

def work(values:dict, cache:str, events, end:tuple[str, int]|None=None):
    """Train the settings; every row, line and the end is sent to `events` with the number of function calls so far. `end` names an event and the number of
    calls after it at which the process kills itself: a moment that does not depend on what else the machine does, and lies between any two calls, such as
    the writes of a file and its renaming. State is saved at every step and evaluation in blocks of one episode, so that there is much to interrupt."""
    os.environ['CDFSS_CACHE'] = cache
    torch.set_num_threads(2)
    from cdfss.basics import InputError
    from cdfss.engine import evaluate, fit, train
    fit.fit.__kwdefaults__['save_every'] = 0.0
    evaluate.evaluate.__kwdefaults__['block'] = 1
    calls, last = 0, None

    def count(*_):
        nonlocal calls
        calls += 1
        if calls == last: os.kill(os.getpid(), signal.SIGKILL)

    def tell(event):
        nonlocal last
        events.send((event, calls))
        if end and event.startswith(end[0]): last = calls + end[1]

    sys.setprofile(count)
    try:
        run = train.train(train.TrainSettings(**values), on_epoch=lambda row: tell(f"epoch {row['epoch']}"), say=tell)
        tell(f'done {run.path}')
    except InputError as e: tell(f'refused {e}')
