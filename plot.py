def drift(folder):
    return {}


def asr(folders, path=None):
    pass


cram = mllm_cl = baselines = asr
