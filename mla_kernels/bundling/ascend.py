def launches(chosen, chip):
    raise NotImplementedError


def compile_all(*a):
    raise NotImplementedError


def toolchain():
    raise NotImplementedError
