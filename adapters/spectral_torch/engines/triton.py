class TritonEngine:
    in_place = True
    def __init__(self, *, fallback): pass
    def accepts(self, job): return False
    def run(self, jobs, n_iter): raise NotImplementedError
