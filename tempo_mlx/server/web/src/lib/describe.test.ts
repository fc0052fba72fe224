import { describe, expect, it } from 'vitest'
import { auditTable, earlyExit } from './describe'

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
