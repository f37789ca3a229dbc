"""Instructions per 32 weights: loops, paths and classes of machine code, occupancy, the command."""

import re

import pytest

import bench
from bench import sass as command
from bench.harness import cuda_compiler, sass
from bench.harness.cuda_compiler import Kernel

SYMBOL = "_ZN4issp4testE"
# A kernel as nvdisasm prints it: 2 instructions, then a loop that loads and stores 2 vectors of 4
# float32. Every iteration has a rare call, an inner loop behind a test, and a slow way for the end
# of a tensor that loads the same 8 weights one by one.
LISTING = f"""
	.section	.text.{SYMBOL},"ax",@progbits
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.64 R4, desc[UR6][R2.64] ;
.L_x_0:
	//## File "/src/csrc/cuda/test.cuh", line 1 inlined at "/src/csrc/cuda/test.cuh", line 7
        /*0020*/                   ISETP.GE.AND P0, PT, R0, R1, PT ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
	//## File "/src/csrc/cuda/test.cuh", line 2 inlined at "/src/csrc/cuda/test.cuh", line 7
{{loads}}
        /*0100*/                   CALL.REL.NOINC `(.L_x_2) ;
.L_x_1:
	//## File "/src/csrc/cuda/test.cuh", line 3 inlined at "/src/csrc/cuda/test.cuh", line 7
        /*0110*/                   LDG.E.128 R8, desc[UR6][R2.64] ;
        /*0120*/                   LDG.E.128 R12, desc[UR6][R2.64+0x200] ;
.L_x_2:
        /*0130*/                   FMUL R8, R8, R5 ;
        /*0140*/                   ISETP.GT.U32.AND P1, PT, R8, R6, PT ;
        /*0150*/               @P1 BRA `(.L_x_4) ;
.L_x_3:
        /*0160*/                   ATOMS.ADD R7, [R9], R8 ;
        /*0170*/               @P2 BRA `(.L_x_3) ;
.L_x_4:
	//## File "/src/csrc/cuda/semantics.h", line 9 inlined at "/src/csrc/cuda/test.cuh", line 4
        /*0180*/               @P3 BRA `(.L_x_5) ;
	//## File "/src/csrc/cuda/semantics.h", line 9 inlined at "/src/csrc/cuda/test.cuh", line 5
        /*0190*/                   MUFU.SQRT R8, R8 ;
        /*01a0*/                   STG.E.128 desc[UR6][R2.64+0x400], R8 ;
        /*01b0*/                   NOP ;
.L_x_5:
	//## File "/src/csrc/cuda/test.cuh", line 6 inlined at "/src/csrc/cuda/test.cuh", line 7
        /*01c0*/                   STG.E.128 desc[UR6][R2.64], R8 ;
        /*01d0*/                   STG.E.128 desc[UR6][R2.64+0x200], R12 ;
        /*01e0*/                   IADD3 R0, R0, 0x100, RZ ;
        /*01f0*/               @P4 BRA `(.L_x_0) ;
        /*0200*/                   EXIT ;
.L_x_6:
        /*0210*/                   BRA `(.L_x_6) ;
""".format(
    loads="\n".join(
        f"        /*{0x40 + 16 * i:04x}*/                   "
        f"LDG.E R{8 + i}, desc[UR6][R2.64+0x{4 * i:x}] ;"
        for i in range(8)
    )
)
SOURCE = ["for (;;) {", "tail();", "load();", "if (rare) {", "search(w);", "store();", "sweep();"]


@pytest.fixture
def code():
    listing = sass.sections(LISTING)
    assert list(listing) == [SYMBOL]
    return sass.Code(listing[SYMBOL], ["search("], {"test.cuh": SOURCE})


class TestCode:
    def test_loops_are_found_by_their_back_branches(self, code):
        inner, main, whole = code.loops
        addresses = [code.blocks[x.header].instructions[0].address for x in code.loops]
        assert addresses == [0x160, 0x20, 0]
        assert main.inner == [inner] and whole.inner == [main] and whole.whole
        assert code.main_loop() is main
        # What nothing reaches, the padding behind the last EXIT, is in no loop.
        reached = [x.address for b in whole.blocks for x in code.blocks[b].instructions]
        assert max(reached) == 0x200

    def test_a_path_loads_and_stores_all_and_makes_no_rare_call(self, code):
        found = code.iteration(code.main_loop(), element_bytes=4)
        # Of the two ways to load 8 weights the shorter has 2 loads, the longer 8 and a jump.
        assert found.weights == 8
        assert found.fewest == 2 + 2 + 3 + 1 + 4
        assert [x.opcode for x in found.instructions] == [
            *("ISETP", "BRA", "LDG", "LDG", "FMUL", "ISETP", "BRA"),
            *("ATOMS", "BRA", "BRA", "STG", "STG", "IADD3", "BRA"),
        ]
        assert found.by_class == {
            "memory": 5, "floating point": 1, "integer": 3, "control": 5
        }  # fmt: skip

    def test_a_rare_call_that_is_not_named_counts_where_it_stores(self):
        code = sass.Code(sass.sections(LISTING)[SYMBOL], [], {"test.cuh": SOURCE})
        found = code.iteration(code.main_loop(), element_bytes=4)
        assert found.fewest == 2 + 2 + 3 + 1 + 3 + 4
        assert "MUFU" in [x.opcode for x in found.instructions]

    def test_inner_loops_count_once_or_not_at_all(self, code):
        whole = code.loops[-1]
        found = code.iteration(whole, element_bytes=4)
        without = code.iteration(whole, element_bytes=4, inner=False)
        # S2R, LDG.E.64 and EXIT stand around the loop.
        assert without.fewest == 3
        assert found.fewest == 3 + code.iteration(code.main_loop(), element_bytes=4).fewest

    def test_weights_of_half_the_size_are_twice_as_many(self, code):
        assert code.iteration(code.main_loop(), element_bytes=2).weights == 16

    def test_the_loop_of_a_call(self, code):
        assert code.loop_of("sweep(") is code.main_loop()
        with pytest.raises(LookupError, match="no loop of the kernel comes from the call sort"):
            code.loop_of("sort(")

    def test_scalars_of_a_table_are_no_weights(self):
        """16 loads at steps from one address are a tile; the others have addresses of their own."""
        tile = [f"LDG.E R{i}, desc[UR6][R2.64+0x{128 * i:x}] ;" for i in range(16)]
        lines = ["LDG.E.64 R30, desc[UR6][R20.64] ;", "LDG.E R32, desc[UR6][R22.64] ;", *tile]
        lines += ["STG.E desc[UR6][R2.64], R4 ;", "EXIT ;"]
        text = "\n".join(f"        /*{16 * i:04x}*/    {x}" for i, x in enumerate(lines))
        code = sass.Code(text)
        assert code.main_loop().whole
        assert code.iteration(code.main_loop(), element_bytes=4).weights == 16

    @pytest.mark.parametrize(
        "opcode, kind",
        [
            *(("LDG", "memory"), ("STS", "memory"), ("ATOMG", "memory"), ("ULDC", "memory")),
            *(("FFMA", "floating point"), ("DSETP", "floating point"), ("MUFU", "floating point")),
            *(("I2F", "floating point"), ("HFMA2", "floating point"), ("BRA", "control")),
            *(("BAR", "control"), ("DEPBAR", "control"), ("BSSY", "control"), ("IMAD", "integer")),
            *(("LOP3", "integer"), ("VOTE", "integer"), ("SHFL", "integer"), ("FLO", "integer")),
            *(("I2I", "integer"), ("SEL", "integer"), ("S2R", "integer"), ("POPC", "integer")),
        ],
    )
    def test_classes(self, opcode, kind):
        assert sass.Instruction(0, "", opcode, "", "", ()).kind == kind


def test_names_of_kernels():
    table = "EEEvNS_5TableIXT1_ENT0_5EntryEEENS_4CallIT_EES4_"
    symbol = f"_ZN4issp12count_kernelINS_7Float32ENS_9OptimizerINS_8AdamRuleEEELi120{table}"
    assert cuda_compiler.readable(symbol) == "count_kernel<Float32, Optimizer, AdamRule, 120>"


def test_the_budget_of_an_h200():
    assert round(command.budget(8.125)) == 56 and round(command.budget(28.25)) == 195


@pytest.mark.parametrize(
    "arch, threads, registers, shared, blocks",
    [
        ("90a", 512, 64, 8368, 2),  # registers: 16 warps * 64 * 32 twice
        ("90a", 512, 40, 41136, 3),  # 40 registers leave room for 3, so do 64 warps for 4
        ("90a", 256, 32, 8368, 8),  # 64 warps
        ("80", 512, 32, 73904, 2),  # 164 KB of shared memory
        ("80", 512, 32, 106672, 1),
        ("100", 64, 16, 0, 32),  # never more than 32 blocks
        ("120", 256, 41, 8368, 5),  # 48 registers as they are given, 1536 threads
        ("120", 512, 32, 8368, 3),  # 48 warps
    ],
)
def test_blocks_of_an_sm(arch, threads, registers, shared, blocks):
    assert command.blocks_per_sm(command.SMS[arch], threads, registers, shared) == blocks


class TestCommand:
    def test_without_nvcc_one_sentence_and_status_2(self, monkeypatch, capsys):
        monkeypatch.setitem(cuda_compiler.SETUP, "nvcc", lambda: None)
        assert bench.main(["sass"]) == 2
        shown = capsys.readouterr().err
        assert "sass needs nvcc: install the CUDA toolkit" in shown and shown.count("\n") == 1

    def test_a_word_that_no_row_has_is_one_sentence_and_status_2(self, capsys):
        assert bench.main(["sass", "--kernel", "lunch"]) == 2
        shown = capsys.readouterr().err
        assert "--kernel lunch: no row has that word" in shown and shown.count("\n") == 1
        assert command.KERNELS[0].name in shown

    def test_the_table(self, monkeypatch, capsys, tmp_path):
        """Compiler and disassembler are imitated: registers and threads are looked up by symbol."""
        what = command.Counted("step, test", "soft_shrink", "test<>", 1000, 8.125)
        kernel = Kernel("test<>", SYMBOL, "sm_90a", 64, 0, 0)
        monkeypatch.setattr(command, "KERNELS", (what,))
        monkeypatch.setattr(command, "RARE", ("search(",))
        monkeypatch.setattr(command, "sources", lambda: {"test.cuh": SOURCE})
        monkeypatch.setattr(command, "disassembler", lambda: "nvdisasm")
        monkeypatch.setitem(cuda_compiler.SETUP, "nvcc", lambda: "nvcc")
        monkeypatch.setitem(cuda_compiler.SETUP, "nvcc_version", lambda _: (13, 0))
        monkeypatch.setattr(cuda_compiler, "machine_code", lambda *_: ("", "cubin"))
        monkeypatch.setattr(cuda_compiler, "kernels", lambda _: [kernel])
        listing = sass.sections(LISTING)
        monkeypatch.setattr(command, "disassembled", lambda _: (listing, {SYMBOL: 512}))
        out = tmp_path / "sass.md"
        assert bench.main(["sass", "--arch", "90a", "--out", str(out)]) == 0
        assert out.read_text() in capsys.readouterr().out
        row = next(x for x in out.read_text().splitlines() if x.startswith("| step, test"))
        cells = [x.strip() for x in row.strip("|").split("|")]
        # A warp's iteration has 256 weights, 8 times 32: 12 and 14 instructions.
        assert cells[:5] == ["step, test", "90a", "256", "1.5", "1.75"]
        assert cells[5:9] == ["0.625", "0.375", "0.125", "0.625"]
        assert cells[9:] == ["56", "64", "0 B", "512", "1000 B", "2", "50 %"]


@pytest.mark.full
@pytest.mark.skipif(cuda_compiler.SETUP["nvcc"]() is None, reason="nvcc is not installed")
def test_the_rows_of_the_step():
    """Every loop that a row names is found in the machine code, and nothing spills."""
    chosen = [x for x in command.KERNELS if x.source == "soft_shrink"]
    rows = command.rows_of("90a", "soft_shrink", chosen)
    assert [row["kernel"] for row in rows] == [x.name for x in chosen]
    for row in rows:
        assert row["weights"] % 32 == 0 and 0 < row["fewest"] <= row["most"], row
        assert row["spilled"] == 0 and row["blocks"] >= 1, row
        assert sum(row[kind] for kind in sass.CLASSES) == pytest.approx(row["most"]), row


def test_constants_are_those_of_the_sources():
    for what in command.KERNELS:
        for sweep in what.sweeps:
            if isinstance(sweep.weights, str):
                assert command.constant(sweep.weights) in (8, 16, 32)
            text = "\n".join(line for lines in command.sources().values() for line in lines)
            assert all(call in text for call in sweep.call.split(" @ "))
    for call in command.RARE:
        assert re.search(re.escape(call), text), f"{call} is in no source of csrc"
