/** Made-up runs, from the same source as the unit tests'. */

import { createRequire } from 'node:module'
import { WEB } from './browser.mjs'

const { runnerImport } = createRequire(`${WEB}package.json`)('vite')
const { module } = await runnerImport(`${WEB}src/testing/runs.ts`, { root: WEB, configFile: false, logLevel: 'error' })

export const { capital, large } = module
