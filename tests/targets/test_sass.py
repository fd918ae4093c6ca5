"""Machine code read by hand-counted examples, for NVIDIA and AMD."""

import pytest

from mla_kernels.targets import amdgcn, loops, sass

# A persistent loop (0x10..0x90) around two inner loops: one with two HMMAs and a spill (0x30..0x60), a longer one
# without (0x70..0x88 has 2). After EXIT: a barrier's slow path, a trap that nothing reaches by itself, the padding.
LISTING = """
\t\tFunction : kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000e700000000800 */
        /*0010*/                   STL [R1+0x4], R10 ;                    /* 0x00000a00ff017b82 */
                                                                          /* 0x000fe80000100800 */
        /*0020*/               @P0 BRA 0x80 ;                             /* 0x00000a00ff017b82 */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R27], [R18.64], !P3 ; /* 0x00000a00ff017b82 */
        /*0040*/                   HMMA.16816.F32.BF16 R12, R28.reuse, R20, R12 ;
        /*0050*/                   LDL.LU R23, [R1+0x4] ;
        /*0060*/                   HMMA.16816.F32.BF16 R12, R28, R22, R12 ;
        /*0070*/              @!P6 BRA 0x30 ;
        /*0080*/                   FFMA R1, R2, R3, R4 ;
        /*0090*/                   MUFU.EX2 R5, R5 ;
        /*00a0*/                   FADD R1, R1, R5 ;
        /*00b0*/                   F2FP.BF16.F32.PACK_AB R1, RZ, R1 ;
        /*00c0*/                   STS [R1], R5 ;
        /*00d0*/                   BRA.U !UP0, 0x80 ;
        /*00e0*/                   BRA 0x10 ;
        /*00f0*/                   EXIT ;
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR21], R0 ;
        /*0110*/              @!P6 BRA 0x100 ;
        /*0120*/                   BPT.TRAP 0x1 ;
        /*0130*/                   BRA 0x130;
"""


def test_sass_instructions():
    instructions = sass.parse(LISTING)
    assert len(instructions) == 20
    first, branch = instructions[0], instructions[7]
    assert (first.address, first.opcode, first.operands, first.control) == (
        0,
        "LDC",
        "R1, c[0x0][0x28]",
        0xE700000000800,
    )
    assert (branch.predicate, branch.name, branch.operands) == ("!P6", "BRA", "0x30")
    assert [sass.kind(i) for i in instructions[:8]] == [
        "constant", "spill", "control", "async copy", "tensor", "spill", "tensor", "control"
    ]  # fmt: skip
    assert sass.tensor_shapes(instructions) == {"HMMA.16816": 2}


def test_hints_to_the_scheduler_are_no_operands():
    plain = sass.parse(LISTING)
    hinted = LISTING.replace("!UP0, 0x80 ;", "!UP0, 0x80      &req={3,1} &wr=0x2  ?WAIT12_END_GROUP;")
    hinted = hinted.replace(" EXIT ;", " EXIT  &rd=0x0  ?trans5;")
    assert sass.parse(hinted) == plain and sass.loops(sass.parse(hinted)) == sass.loops(plain)


def test_a_line_that_is_no_instruction_is_not_overlooked():
    with pytest.raises(
        ValueError, match=r"machine code: '/\*0050\*/ +LDL.LU R23, \[R1\+0x4\] \?' is in no form that is"
    ):
        sass.parse(LISTING.replace("LDL.LU R23, [R1+0x4] ;", "LDL.LU R23, [R1+0x4] ?"))


def test_sass_main_loop_is_the_innermost_with_tensor_instructions():
    instructions = sass.parse(LISTING)
    kinds = [sass.kind(instruction) for instruction in instructions]
    found = sass.loops(instructions)
    assert [(loop[0], loop[-1]) for loop in found] == [(1, 14), (3, 7), (8, 13)]
    main = loops.main_loop(kinds, found)
    assert main == (3, 4, 5, 6, 7)
    assert loops.mix(kinds, main) == {"tensor": 2, "async copy": 1, "spill": 1, "control": 1}


def test_sass_main_loop_without_tensor_instructions_is_the_longest():
    instructions = sass.parse(LISTING.replace("HMMA", "HFMA2"))
    kinds = [sass.kind(instruction) for instruction in instructions]
    assert loops.main_loop(kinds, sass.loops(instructions)) == (8, 9, 10, 11, 12, 13)


def test_sass_loop_that_ends_behind_a_conditional_exit():
    """The shape of a persistent kernel on sm_90: the last EXIT is predicated, the branch back stands behind it."""
    text = "\n".join(
        f"        /*{address:04x}*/  {code} ;"
        for address, code in enumerate(
            ["LDC R1, c[0x0][0x28]", "FADD R1, R1, R2", "STG.E [R2.64], R1", "@P0 EXIT", "BRA 0x1", "BRA 0x5"]
        )
    )
    assert sass.loops(sass.parse(text)) == [(1, 2, 3, 4)]


def test_loops_that_only_wait_do_not_count():
    assert loops.main_loop(["sync", "control", "float", "control"], [(0, 1), (2, 3)]) == (2, 3)
    assert loops.main_loop(["sync", "control"], [(0, 1)]) == ()
    assert loops.main_loop([], []) == ()


def test_sass_traps():
    assert sass.traps(sass.parse(LISTING)) == 0  # behind the last EXIT: ptxas's own error handler
    assert sass.traps(sass.parse(LISTING.replace("FADD R1, R1, R5", "BPT.TRAP 0x1"))) == 1
    assert sass.traps(sass.parse("        /*0000*/   BPT.TRAP 0x1 ;\n        /*0010*/   BRA 0x10;")) == 1  # no EXIT


AMD = """
kernel:                                 ; @kernel
; %bb.0:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\tscratch_store_dword off, v0, off        ; 4-byte Folded Spill
\ts_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
\tglobal_store_dword v0, v1, s[2:3]
\ts_cbranch_scc1 .LBB0_5
.LBB0_2:                                ; =>This Loop Header: Depth=1
                                        ;     Child Loop BB0_3 Depth 2
\tglobal_load_dwordx4 v[0:3], v4, s[2:3]
.LBB0_4:                                ; %tail
                                        ;   in Loop: Header=BB0_3 Depth=2
\tv_mfma_f32_32x32x8_bf16 v[16:31], v[84:85], v[40:41], v[16:31]
\tscratch_load_dword v0, off, off         ; 4-byte Folded Reload
\ts_cbranch_scc1 .LBB0_1
.LBB0_3:                                ; %body
                                        ;   Parent Loop BB0_2 Depth=1
                                        ; =>  This Inner Loop Header: Depth=2
\tds_read_b128 v[0:3], v4
\tv_exp_f32_e32 v0, v0
\ts_branch .LBB0_4
.LBB0_5:
\ts_endpgm
.Lfunc_end0:
\tv_never_read v0
\t.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     4
    .vgpr_count:     140
    .sgpr_spill_count: 2
    .vgpr_spill_count: 1
"""


def test_amd_loops_and_spills():
    instructions, found = amdgcn.parse(AMD)
    kinds = [amdgcn.kind(instruction) for instruction in instructions]
    assert len(instructions) == 13
    assert sorted(found) == [(3, 4, 5, 6, 7, 8, 9, 10, 11), (6, 7, 8, 9, 10, 11)]
    main = loops.main_loop(kinds, found)
    assert loops.mix(kinds, main) == {"control": 2, "tensor": 1, "spill": 1, "shared load": 1, "special": 1}
    assert kinds.count("spill") == 2
    assert amdgcn.tensor_shapes(instructions) == {"v_mfma_f32_32x32x8_bf16": 1}


def test_amd_resources():
    assert amdgcn.resources(AMD) == {
        "agpr_count": 4,
        "vgpr_count": 140,
        "sgpr_spill_count": 2,
        "vgpr_spill_count": 1,
    }
