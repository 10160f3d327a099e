"A training run in a process of its own, to be watched and killed: test_resume starts it."
import os
import torch

def work(values:dict, cache:str, events):
    """Train the settings; every row, line and the end is sent to `events`. State is saved at every step and evaluation in blocks of one episode, so that
    there is much to interrupt."""
    os.environ['CDFSS_CACHE'] = cache
    torch.set_num_threads(2)
    from cdfss.basics import InputError
    from cdfss.engine import evaluate, fit, train
    fit.fit.__kwdefaults__['save_every'] = 0.0
    evaluate.evaluate.__kwdefaults__['block'] = 1
    try:
        run = train.train(train.TrainSettings(**values), on_epoch=lambda row: events.send(f"epoch {row['epoch']}"), say=events.send)
        events.send(f'done {run.path}')
    except InputError as e: events.send(f'refused {e}')
