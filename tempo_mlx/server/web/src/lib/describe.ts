/** What there is to say about a member, in words. */

import type { Member } from './lattice'
import { endsText, isShown, numberOf, type Rejected, type Step, type Values } from './run'
import { visible } from './text'

export type Status = 'kept' | 'pruned' | 'unattended' | 'end'

export function statusOf({ token }: Member): Status {
  if (endsText(token)) return 'end'
  if (token.removed_after === null) return 'kept'
  return isShown(token) ? 'unattended' : 'pruned'
}

/** Why a member is there, or no longer, as far as the run file tells. */
export function why(member: Member, step: Step): string {
  const { token, rank } = member
  const removal = token.removed_why
  if (token.removed_after !== null) {
    const what = statusOf(member) === 'unattended' ? 'No longer attended to' : 'Removed'
    const when = `after the rows of step ${token.removed_after}`
    if (!removal) return `${what} ${when}.`
    if (removal.signal === 'by hand') return `${what} by hand ${when}.`
    const kept = removal.unattended ? ' It stays in the text, as the last of its set.' : ''
    return `${what} ${when}: ${removal.signal} ${short(removal.score)} is under ${short(removal.threshold)}.${kept}`
  }
  if (endsText(token)) return 'Ends the text here; it has no row, so nothing follows it.'
  if (step.threshold === null) return 'Chosen by the decoder.'
  if (rank === 0) return 'The most probable token of its step, which is always kept.'
  return `Its probability ${short(token.probability)} reaches the threshold ${short(step.threshold)}.`
}

/** One sentence for people who listen. */
export function describe(member: Member, step: Step): string {
  const { token } = member
  const share = `${(100 * token.probability).toFixed(1)} percent`
  const place = `step ${member.step}, ${member.rank + 1} of ${step.tokens.length}`
  return `${visible(token.text)}, ${share}, ${place}, ${statusOf(member)}. ${why(member, step)}`
}

export function describeRejected(item: Rejected): string {
  return `${visible(item.text)}, ${short(item.probability)}: ${item.why}`
}

/** What the audit of an early-exit run comes to, in a few words, much as report/terminal.py says it. */
export function earlyExit(audit: Values): string[] {
  if (audit.lossless === true) return ['early exit, lossless']
  const facts: string[] = []
  const layers = numberOf(audit, 'mean_layers')
  if (layers !== null) facts.push(`${short(layers)} layers a step`)
  const agreement = numberOf(audit, 'agreement')
  if (agreement !== null) facts.push(`${short(100 * agreement)}% of audited early choices agreed`)
  else facts.push(exitsOf(audit).some((exit) => exit.left !== 0) ? 'early choices not audited' : 'nothing left early')
  const ahead = numberOf(audit, 'accepted')
  if (ahead) facts.push(`${ahead} steps run ahead`)
  return facts
}

/** The audit as a table: one line for each exit, after what concerns all of them. */
export function auditTable(audit: Values): Values {
  const { exits: _, ...whole } = audit
  const lines = exitsOf(audit).map(({ layer, left, audited, agreed, closed }) => [
    `layer ${String(layer)}`,
    `${String(left)} left, ${String(agreed)} of ${String(audited)} agreed${closed === true ? ', closed' : ''}`,
  ])
  return { ...whole, ...(Object.fromEntries(lines) as Values) }
}

function exitsOf({ exits }: Values): Values[] {
  if (!Array.isArray(exits)) return []
  return exits.filter((exit): exit is Values => typeof exit === 'object' && exit !== null && !Array.isArray(exit))
}

/** Three significant digits. */
export function short(value: number): string {
  if (value === 0) return '0'
  if (Math.abs(value) < 0.0005) return value.toExponential(1)
  return String(Number(value.toPrecision(3)))
}
