"""The usual attacks through pickles and zip archives, each as (name, bytes of a file). None may
ever run under our reader.
"""

import os
import pickle

import checkpoint_factory as factory
from checkpoint_factory import Call, Global, Persistent, pickled, zip_of


class Attack:
    """What the usual attacks are made with: an object that pickles as a call."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def attacks(wire):
    write = f"__import__('os').mkdir({str(wire)!r})"
    shell = f"touch {wire}"
    yield "os.system", pickle.dumps(Attack(os.system, (shell,)), 2)
    yield "protocol 0", pickle.dumps(Attack(os.system, (shell,)), 0)
    yield "eval", pickle.dumps(Attack(eval, (write,)), 4)
    yield "exec in a weights dict", pickle.dumps({"g_ema": {"x": Attack(exec, (write,))}}, 4)
    for module, name in (
        ("subprocess", "call"),
        ("builtins", "exec"),
        ("__builtin__", "eval"),
        ("posix", "system"),
        ("runpy", "run_path"),
    ):
        yield f"{module}.{name}", pickled(Call(Global(module, name), (shell,)))
    yield (
        "chain",
        pickled(
            Call(Call(Global("builtins", "getattr"), (Global("os", "path"), "system")), (shell,))
        ),
    )
    yield "getattr walk", b"\x80\x04\x8c\x08builtins\x8c\x11__import__.__self__\x93."
    yield (
        "dotted walk in an allowed module",
        pickled(Call(Global("collections", "OrderedDict.__init__.__globals__"), ())),
    )
    yield "dotted walk through numpy", b"\x80\x04\x8c\x05numpy\x8c\x10ctypeslib.os.sys\x93."
    yield "numpy.load", pickled(Call(Global("numpy", "load"), ("x",)))
    yield "torch.load", pickled(Call(Global("torch.serialization", "load"), ("x",)))
    yield "copyreg extension 1", b"\x80\x02\x82\x01)R."
    yield "copyreg extension 2", b"\x80\x02\x83\x01\x00)R."
    yield "copyreg extension 4", b"\x80\x02\x84\x01\x00\x00\x00)R."
    yield "add extension", pickled(Call(Global("copyreg", "add_extension"), ("os", "system", 1)))
    yield "INST", b"(S'" + shell.encode() + b"'\nios\nsystem\n."
    yield "OBJ", b"(cos\nsystem\nS'" + shell.encode() + b"'\no."
    yield "NEWOBJ", b"\x80\x02cos\nsystem\n(S'x'\nt\x81."
    yield "NEWOBJ_EX", b"\x80\x04cos\nsystem\n(S'x'\nt}\x92."
    yield (
        "BUILD on a name",
        b"\x80\x02ccollections\nOrderedDict\n" + factory.assemble({"__reduce__": 1}) + b"b.",
    )
    yield "BUILD on a list", b"\x80\x02]" + factory.assemble({"append": 1}) + b"b."
    yield (
        "BUILD with slots",
        b"\x80\x02cnumpy\nndarray\n" + factory.assemble((None, {"shape": 1})) + b"b.",
    )
    yield (
        "set state by a call",
        pickled(Call(Global("builtins", "setattr"), (Global("numpy", "dtype"), "x", 1))),
    )
    yield "memo out of range", b"\x80\x02j\xff\xff\xff\xff."
    yield (
        "memo overwritten by a call",
        b"\x80\x02cos\nsystem\nq\x00h\x00(S'" + shell.encode() + b"'\ntR.",
    )
    yield "calling a value", pickled(Call("text", ()))
    yield "calling a type name", pickled(Call(Global("torch", "FloatStorage"), (3,)))
    yield "persistent id", pickled(Persistent(("storage", Global("os", "system"), "0", "cpu", 1)))
    yield "persistent module", b"\x80\x02(S'module'\nS'" + shell.encode() + b"'\ntQ."
    yield "text persistent id", b"P" + shell.encode() + b"\n."
    yield (
        "object arrays",
        pickled(
            Call(
                Global("numpy", "dtype"),
                ("O8", False, True),
                (3, "|", None, None, None, -1, -1, 63),
            )
        ),
    )
    yield (
        "embedded stream",
        pickled(
            Call(
                Global("torch.storage", "_load_from_bytes"),
                (pickle.dumps(Attack(os.system, (shell,)), 2),),
            )
        ),
    )
    yield "zip", factory.torch_zip({"g_ema": Call(Global("os", "system"), (shell,))})
    yield "out-of-band buffer", b"\x80\x05\x97."
    for module, name in (
        ("importlib", "import_module"),
        ("pickle", "loads"),
        ("_pickle", "loads"),
        ("marshal", "loads"),
        ("types", "FunctionType"),
        ("types", "CodeType"),
        ("code", "InteractiveInterpreter"),
        ("pty", "spawn"),
        ("shutil", "rmtree"),
        ("os", "execv"),
        ("nt", "system"),
        ("socket", "create_connection"),
        ("webbrowser", "open"),
        ("ctypes", "CDLL"),
        ("builtins", "open"),
        ("builtins", "compile"),
        ("builtins", "__import__"),
        ("builtins", "type"),
        ("builtins", "globals"),
        ("operator", "attrgetter"),
        ("operator", "methodcaller"),
        ("functools", "partial"),
        ("functools", "reduce"),
        ("copyreg", "_reconstructor"),
        ("asyncio.unix_events", "_UnixSubprocessTransport._start"),
        ("timeit", "timeit"),
        ("cProfile", "run"),
        ("bdb", "Bdb.run"),
        ("pdb", "run"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.jit", "load"),
        ("torch.utils.collect_env", "run"),
        ("torch._dynamo.guards", "GuardBuilder.get"),
        ("torch.fx.experimental.symbolic_shapes", "ShapeEnv.evaluate_guards_expression"),
        ("numpy.testing._private.utils", "runstring"),
        ("numpy", "fromfile"),
        ("numpy.f2py.crackfortran", "getlincoef"),
        ("numpy.core._multiarray_umath", "_reconstruct"),
        ("dnnlib.util", "call_func_by_name"),
        ("dnnlib.util", "get_obj_by_name"),
        ("torch_utils.persistence", "persistent_class"),
        ("torch_utils.persistence", "_src_to_module"),
        ("distutils.file_util", "write_file"),
        ("pip", "main"),
        ("jax", "pure_callback"),
    ):
        yield f"{module}.{name}", pickled(Call(Global(module, name), (shell,)))
    yield "case of a name", pickled(Call(Global("Builtins", "eval"), (write,)))
    yield "name with a space", pickled(Call(Global("builtins", "eval "), (write,)))
    yield "name with a zero", pickled(Call(Global("builtins", "eval\0"), (write,)))
    yield "lookalike letters", b"\x80\x04\x8c\x09bu\xc4\xb1ltins\x8c\x04eval\x93."
    yield "name in pieces", b"\x80\x04\x8c\x00\x8c\x09os.system\x93."
    yield "name that is no text", b"\x80\x04K\x01\x8c\x06system\x93."
    yield "name by memo", b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93(\x8c\x01xtR."
    yield "class of a builder", pickled(Call(Global("collections", "OrderedDict.fromkeys"), ([1],)))
    yield "subclass walk", pickled(Call(Global("builtins", "object.__subclasses__"), ()))
    yield "arguments that are no tuple", b"\x80\x02ccollections\nOrderedDict\n]R."
    yield "keyword arguments", b"\x80\x04ccollections\nOrderedDict\n)}\x92."
    yield (
        "second pickle behind the first",
        b"\x80\x02}." + pickle.dumps(Attack(os.system, (shell,)), 2),
    )
    yield (
        "call in a key",
        b"\x80\x02}" + factory.assemble(Call(Global("os", "system"), (shell,))) + b"Ns.",
    )
    yield (
        "call in a discarded value",
        factory.assemble(Call(Global("os", "system"), (shell,))).join((b"\x80\x02", b"0}.")),
    )
    yield (
        "call behind a mark",
        b"\x80\x02(" + factory.assemble(Call(Global("os", "system"), (shell,))) + b"1}.",
    )
    yield (
        "state of a state",
        pickled(Call(Global("argparse", "Namespace"), (), Call(Global("os", "system"), (shell,)))),
    )
    yield (
        "module source",
        pickled(
            {
                "G_ema": factory.persistent_module(
                    {},
                    {
                        "": {
                            "module_src": write,
                            "_modules": {"x": Call(Global("os", "system"), ())},
                        }
                    },
                )
            }
        ),
    )
    yield "legacy stream", factory.torch_legacy({"g_ema": Call(Global("os", "system"), (shell,))})
    yield (
        "keys of a legacy stream",
        factory.torch_legacy({})[: -len(pickled([]))]
        + pickle.dumps(Attack(os.system, (shell,)), 2),
    )
    yield (
        "zip with two pickles",
        zip_of(
            {
                "a/data.pkl": pickled({}),
                "b/data.pkl": pickled(Call(Global("os", "system"), (shell,))),
            }
        ),
    )
    yield (
        "zip that climbs",
        zip_of(
            {"../../x": b"", "archive/../data.pkl": pickled(Call(Global("os", "system"), (shell,)))}
        ),
    )
    yield (
        "TorchScript",
        zip_of(
            {
                "a/constants.pkl": pickled(Call(Global("os", "system"), (shell,))),
                "a/data.pkl": pickled({}),
                "a/code/x.py": write.encode(),
            }
        ),
    )
    yield (
        "TorchScript's own names",
        zip_of(
            {
                "a/constants.pkl": pickled(()),
                "a/data.pkl": pickled(Call(Global("__torch__.os", "system"), (shell,))),
            }
        ),
    )
