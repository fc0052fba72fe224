import { describe, expect, it } from 'vitest'
import { auditTable, earlyExit, why } from './describe'
import type { Member } from './lattice'
import type { Step } from './run'

const exit = { layer: 24, target: 0.95, least: 4.2, left: 9, audited: 8, agreed: 7, closed: false }
const audit = { kv: 'exact', passes: 18, mean_layers: 28.25, agreement: 0.875, exits: [exit] }

describe('the audit of an early-exit run', () => {
  it.each([
    [audit, ['28.3 layers a step', '87.5% of audited early choices agreed']],
    [{ ...audit, accepted: 4 }, ['28.3 layers a step', '87.5% of audited early choices agreed', '4 steps run ahead']],
    [{ ...audit, accepted: 0 }, ['28.3 layers a step', '87.5% of audited early choices agreed']],
    [{ ...audit, agreement: null }, ['28.3 layers a step', 'early choices not audited']],
    [{ passes: 0, mean_layers: null, agreement: null, exits: [{ ...exit, left: 0 }] }, ['nothing left early']],
    [{ lossless: true, layer: 27, target: 0.95 }, ['early exit, lossless']],
  ])('%j', (given, words) => expect(earlyExit(given)).toEqual(words))

  it('has a line for each exit', () => {
    const closed = { ...exit, layer: 27, closed: true }
    expect(auditTable({ kv: 'exact', exits: [exit, closed] })).toEqual({
      kv: 'exact',
      'layer 24': '9 left, 7 of 8 agreed',
      'layer 27': '9 left, 7 of 8 agreed, closed',
    })
  })
})

describe('why a token is there', () => {
  const member = (rank: number) =>
    ({ rank, token: { id: 5, slot: 3, removed_after: null, probability: 0.25 } }) as unknown as Member
  const step = (threshold: number | null) => ({ threshold }) as unknown as Step

  it.each([
    [0, 0.1, 'The most probable token of its step, which is always kept.'],
    [1, 0.1, 'Its probability 0.25 reaches the threshold 0.1.'],
    [0, null, 'Chosen by the decoder.'], // it may have been drawn
  ])('of rank %i at threshold %s', (rank, threshold, words) => expect(why(member(rank), step(threshold))).toBe(words))
})
