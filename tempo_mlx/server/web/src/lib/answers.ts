/** The answers that a model holds to a question, as `ask` finds them. */

export interface AnswerText {
  text: string
  logprob: number
}

export interface Answer {
  text: string
  /** bounds of its probability */
  lower: number
  upper: number
  /** without bias, from samples; null where none were drawn */
  estimate: number | null
  texts: AnswerText[]
}

export interface Answers {
  question: string
  /** the most probable first */
  answers: Answer[]
  /** the probability of all texts that were not looked at */
  not_looked_at: number
  /** could those not change which answer is the most probable? */
  decided: boolean
  /** are there so many texts that no list of answers says anything? */
  open_ended?: boolean
  /** of an open-ended question: what the model says, then the other texts, each once */
  texts?: AnswerText[] | null
}

/** Enough checking that no view can fail on what passes. */
export function isAnswers(value: Record<string, unknown>): boolean {
  const { question, answers, not_looked_at, texts } = value
  return (
    typeof question === 'string' &&
    typeof not_looked_at === 'number' &&
    Array.isArray(answers) &&
    answers.every(isAnswer) &&
    areTexts(texts ?? [])
  )
}

function isAnswer(value: unknown): boolean {
  const { text, lower, upper, texts } = (value ?? {}) as Record<string, unknown>
  if (typeof text !== 'string' || typeof lower !== 'number' || typeof upper !== 'number') return false
  return areTexts(texts)
}

function areTexts(value: unknown): boolean {
  const isText = (one: Partial<AnswerText> | null) => typeof one?.text === 'string' && typeof one.logprob === 'number'
  return Array.isArray(value) && value.every(isText)
}
