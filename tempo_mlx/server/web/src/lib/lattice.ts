/** The lattice as the views need it: members with their edges, the best path, and who descends from whom. */

import { endsText, isShown, type Run, type Step, type Token } from './run'

/** A probability that underflowed must not cut the only path there is: the smallest normal double, as numpy has it. */
const TINY = 2 ** -1022

export interface Edge {
  /** index of the parent among `members` */
  member: number
  /** P(parent | child) */
  posterior: number
  /** P(child | parent) */
  forward: number
}

export interface Member {
  index: number
  step: number
  /** place in its set, 0 is the most probable */
  rank: number
  token: Token
  parents: Edge[]
  children: Edge[]
}

export class Lattice {
  readonly steps: Step[] = []
  readonly members: Member[] = []
  /** index of the first member of each step; one more entry at the end */
  readonly first: number[] = [0]
  private readonly bySlot = new Map<number, number>()
  private readonly best = new Paths()
  /** scores of steps before this one are up to date */
  private scored = 0
  private branching = false

  static of(run: Pick<Run, 'steps'>): Lattice {
    const lattice = new Lattice()
    for (const step of run.steps) lattice.append(step)
    return lattice
  }

  get length(): number {
    return this.steps.length
  }

  append(step: Step): void {
    step.tokens.forEach((token, rank) => {
      const index = this.members.length
      const parents: Edge[] = []
      for (const [slot, posterior, forward] of token.parents) {
        const parent = this.bySlot.get(slot)
        if (parent === undefined) continue
        parents.push({ member: parent, posterior, forward })
        this.members[parent]!.children.push({ member: index, posterior, forward })
      }
      this.members.push({ index, step: this.steps.length, rank, token, parents, children: [] })
      if (token.branch !== undefined) this.branching = true
    })
    for (let index = this.first[this.steps.length]!; index < this.members.length; index++) {
      const slot = this.members[index]!.token.slot
      if (slot !== null) this.bySlot.set(slot, index)
    }
    this.scored = Math.min(this.scored, Math.max(0, this.length - 1)) // which was the last, and no longer is
    this.steps.push(step)
    this.first.push(this.members.length)
  }

  membersOf(step: number): Member[] {
    return this.members.slice(this.first[step], this.first[step + 1])
  }

  memberAtSlot(slot: number): Member | undefined {
    const index = this.bySlot.get(slot)
    return index === undefined ? undefined : this.members[index]
  }

  /** Replace what later steps learn about a member (removal, posterior, attention). Returns its step. */
  update(slot: number, change: Partial<Token>): number | null {
    const member = this.memberAtSlot(slot)
    if (!member) return null
    Object.assign(member.token, change)
    this.scored = Math.min(this.scored, member.step)
    return member.step
  }

  /**
   * The members of a step that a path may take, as usable() in decode/paths.py, for which tests/readings.json has cases.
   * Of branches any can end at any step.
   */
  private usable(step: number): Member[] {
    const last = this.branching || step === this.length - 1
    const candidates = this.membersOf(step).filter(({ token }) => last || token.slot !== null)
    const usable = candidates.filter(({ token }) => isShown(token))
    return usable.length > 0 ? usable : candidates
  }

  /**
   * Member index for each step of the most probable path over the edges P(j|i) (Viterbi). Of branches, the one with the
   * best mean log-probability, which may end before the last step.
   */
  bestPath(): number[] {
    const last = this.length - 1
    for (; this.scored <= last; this.scored++) {
      this.best.extend(this.usable(this.scored), this.scored > 0 ? this.usable(this.scored - 1) : null)
    }
    if (!this.branching) return last < 0 ? [] : this.best.pathTo(this.usable(last))
    const ends = this.steps.flatMap((_, step) => this.usable(step)).filter((m) => m.step === last || endsText(m.token))
    return this.best.pathTo(ends, (member) => member.step + 1)
  }

  /** The most probable path that spells `ids`, as trace() in decode/paths.py; [] where there is none. */
  locate(ids: readonly number[]): number[] {
    const found = new Paths()
    let before: Member[] | null = null
    let spelled = 0
    for (let step = 0; step < this.length && spelled < ids.length; step++) {
      let members = this.usable(step)
      if (members.some(({ token }) => isShown(token))) {
        const id = ids[spelled++]
        members = members.filter(({ token }) => token.id === id)
      }
      if (members.length === 0) return []
      found.extend(members, before)
      before = members
    }
    return spelled === ids.length && before ? found.pathTo(before) : []
  }

  /**
   * Lineage posterior of a member: for every earlier member the probability that a path through `index` used it
   * (gamma of defaults.md, from the recorded edges alone), itself included with 1.
   */
  ancestry(index: number): Map<number, number> {
    return this.spread(index, (member) => member.parents.map((edge) => [edge.member, edge.posterior]))
  }

  /** For every later member the share of its past that runs through `index`, itself included with 1. */
  descent(index: number): Map<number, number> {
    return this.spread(index, (member) => member.children.map((edge) => [edge.member, edge.posterior]))
  }

  private spread(index: number, next: (member: Member) => [number, number][]): Map<number, number> {
    const share = new Map([[index, 1]])
    let layer = new Map(share)
    while (layer.size > 0) {
      const following = new Map<number, number>()
      for (const [member, value] of layer) {
        for (const [other, factor] of next(this.members[member]!)) {
          following.set(other, (following.get(other) ?? 0) + value * factor)
        }
      }
      for (const [member, value] of following) {
        if (value < 1e-4) following.delete(member)
        else share.set(member, value)
      }
      layer = following
    }
    return share
  }
}

/** The best path to each member that was reached; layers are added, or added anew, in order. */
class Paths {
  private readonly score: number[] = []
  private readonly back: number[] = []

  /** From the members of one set to those of the next, null before the first. Ties go to the more probable member. */
  extend(members: readonly Member[], before: readonly Member[] | null): void {
    for (const { index, token, parents } of members) {
      this.score[index] = before ? -Infinity : log(token.probability)
      this.back[index] = -1
      const forward = new Map(parents.map((edge) => [edge.member, edge.forward]))
      for (const { index: parent } of before ?? []) {
        const score = this.score[parent]! + log(forward.get(parent) ?? 0)
        if (score > this.score[index]) {
          this.score[index] = score
          this.back[index] = parent
        }
      }
    }
  }

  /** The best of the paths to these members, by score over `length`. */
  pathTo(members: readonly Member[], length: (member: Member) => number = () => 1): number[] {
    let best = -1
    let bestScore = -Infinity
    for (const member of members) {
      const score = this.score[member.index]! / length(member)
      if (score > bestScore) {
        bestScore = score
        best = member.index
      }
    }
    const path: number[] = []
    for (let at = best; at >= 0; at = this.back[at]!) path.push(at)
    return path.reverse()
  }
}

function log(probability: number): number {
  return Math.log(Math.max(probability, TINY))
}

/** The probability mass of a step: 1, or more where the members of different branches have distributions of their own. */
export function mass(step: Step): number {
  return step.tokens.reduce((sum, token) => sum + token.probability, Math.max(0, step.residual_probability))
}

/** Entropy in bits of a recorded set, its residual mass counted as one more outcome (so a lower bound). */
export function entropy(step: Step): number {
  const whole = mass(step)
  let bits = 0
  for (const p of [...step.tokens.map((token) => token.probability), step.residual_probability]) {
    if (p > 0) bits -= (p / whole) * Math.log2(p / whole)
  }
  return Math.max(0, bits)
}

/** Members of a step that are still there. */
export function aliveWidth(step: Step): number {
  return step.tokens.reduce((n, token) => n + (token.removed_after === null ? 1 : 0), 0)
}
