"A training run in a process of its own, to be watched and killed: test_resume starts it."
import os, signal, time
import torch

def work(values:dict, cache:str, events, end:tuple[str, float]|None=None):
    """Train the settings; every row, line and the end is sent to `events` with the CPU time so far. `end` names an event and the CPU seconds after it at which
    the process dies. State is saved at every step and evaluation in blocks of one episode, so that there is much to interrupt."""
    os.environ['CDFSS_CACHE'] = cache
    torch.set_num_threads(2)
    from cdfss.basics import InputError
    from cdfss.engine import evaluate, fit, train
    fit.fit.__kwdefaults__['save_every'] = 0.0
    evaluate.evaluate.__kwdefaults__['block'] = 1

    def tell(event):
        events.send((event, time.process_time()))
        # SIGPROF has no handler: the kernel ends the process as SIGKILL would, and CPU time does not depend on what else the machine does
        if end and event.startswith(end[0]): signal.setitimer(signal.ITIMER_PROF, end[1])

    try:
        run = train.train(train.TrainSettings(**values), on_epoch=lambda row: tell(f"epoch {row['epoch']}"), say=tell)
        tell(f'done {run.path}')
    except InputError as e: tell(f'refused {e}')
